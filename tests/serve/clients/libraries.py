"""Python libraries as clients of `qsun serve`: python libraries.py NAME. The last line printed says what was done.

The model is tiny, so its text is not looked at; a forced call and structured output must be valid whatever it says.
"""

import json
import os
import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

URL = os.environ["QSUN_URL"] + "/v1"
KEY = "any-key-will-do"
MESSAGES = [{"role": "user", "content": "calc 12+8"}]


class Fruit(BaseModel):
    """A fruit, whose values are few, so that any model ends it."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["apple", "pear"]
    pieces: int = Field(ge=1, le=9)


TOOL = {
    "type": "function",
    "function": {"name": "buy", "description": "Buy fruit.", "parameters": Fruit.model_json_schema()},
}
CHOICE = {"type": "function", "function": {"name": "buy"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": Fruit.model_json_schema(), "strict": True}}


def openai() -> str:
    from openai import BadRequestError, NotFoundError, OpenAI

    client = OpenAI(base_url=URL, api_key=KEY, max_retries=0)
    assert client.models.retrieve("base").id == "base"
    assert client.completions.create(model="base", prompt="calc 1+1>", max_tokens=4).usage.completion_tokens <= 4
    chunks = list(
        client.chat.completions.create(
            model="base", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens <= 8
    forced = client.chat.completions.create(model="base", messages=MESSAGES, tools=[TOOL], tool_choice=CHOICE)
    (call,) = forced.choices[0].message.tool_calls
    Fruit.model_validate_json(call.function.arguments)
    history = [*MESSAGES, forced.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    client.chat.completions.create(model="base", messages=history, tools=[TOOL], max_tokens=8)
    with client.chat.completions.stream(
        model="base", messages=MESSAGES, tools=[TOOL], tool_choice="required"
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    Fruit.model_validate_json(streamed.message.tool_calls[0].function.arguments)
    parsed = client.chat.completions.parse(model="base", messages=MESSAGES, response_format=Fruit)
    assert isinstance(parsed.choices[0].message.parsed, Fruit)
    assert client.responses.create(model="base", input="calc 1+1", max_output_tokens=8).status
    assert isinstance(client.responses.parse(model="base", input="x", text_format=Fruit).output_parsed, Fruit)
    with client.responses.stream(model="base", input="calc 1+1", text_format=Fruit) as events:
        assert isinstance(events.get_final_response().output_parsed, Fruit)
    for error, body in ((NotFoundError, {"model": "none"}), (BadRequestError, {"model": "base", "max_tokens": 0})):
        try:
            client.chat.completions.create(messages=MESSAGES, **body)
        except error:
            continue
        raise AssertionError(error)
    return "chat, stream, tools, parse, responses, errors"


def litellm() -> str:
    from litellm import completion

    common = {"model": "openai/base", "api_base": URL, "api_key": KEY, "messages": MESSAGES, "num_retries": 0}
    assert completion(**common, max_tokens=8).usage.completion_tokens <= 8
    assert list(completion(**common, max_tokens=8, stream=True))
    forced = completion(**common, tools=[TOOL], tool_choice=CHOICE)
    Fruit.model_validate_json(forced.choices[0].message.tool_calls[0].function.arguments)
    Fruit.model_validate_json(completion(**common, response_format=FORMAT).choices[0].message.content)
    return "chat, stream, tools, json_schema"


def langchain() -> str:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=URL, api_key=KEY, model="base", max_tokens=256, max_retries=0)
    assert model.invoke("calc 1+1").usage_metadata["output_tokens"]
    assert list(model.stream("calc 1+1"))
    calls = model.bind_tools([Fruit], tool_choice="Fruit").invoke("calc 1+1").tool_calls
    Fruit.model_validate(calls[0]["args"])
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Fruit, method=method).invoke("calc 1+1"), Fruit)
    return "chat, stream, tools, structured output in two ways"


def llama_index() -> str:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        api_base=URL, api_key=KEY, model="base", is_chat_model=True, is_function_calling_model=True, max_tokens=256,
        context_window=8192, max_retries=0,
    )  # fmt: skip
    question = ChatMessage(role="user", content="calc 1+1")
    assert model.chat([question]).message.role == "assistant"
    assert list(model.stream_chat([question]))
    assert model.complete("calc 1+1") is not None

    def buy(name: Literal["apple", "pear"], pieces: Literal[1, 2]) -> str:
        """Buy fruit."""
        return f"{pieces} {name}"

    answer = model.chat_with_tools([FunctionTool.from_defaults(buy)], user_msg=question, tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    assert buy(**call.tool_kwargs)
    return "chat, stream, completion, tools"


def pydantic_ai() -> str:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("base", provider=OpenAIProvider(base_url=URL, api_key=KEY))
    settings = {"max_tokens": 256}
    assert Agent(model, model_settings=settings).run_sync("calc 1+1").output is not None
    for output in (Fruit, NativeOutput(Fruit)):
        found = Agent(model, output_type=output, model_settings=settings, retries=0).run_sync("calc 1+1").output
        assert isinstance(found, Fruit)
    return "text, output by a tool, native output"


def instructor() -> str:
    import instructor
    from openai import OpenAI

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY), mode=mode)
        found = client.chat.completions.create(
            model="base", messages=MESSAGES, response_model=Fruit, max_tokens=256, max_retries=0
        )
        assert isinstance(found, Fruit)
    return "tools, json_schema"


if __name__ == "__main__":
    name = sys.argv[1].replace("-", "_")
    try:
        done = globals()[name]()
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    print(json.dumps(done)[1:-1])
