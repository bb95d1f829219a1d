"""POST /v1/chat/completions."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from qsun.engine.config import MOST_LOGPROBS
from qsun.serve.api.bodies.fields import Body, Flag, Name, Positive, Text, wrong
from qsun.serve.api.bodies.messages import MOST_CALLS, ChatMessage
from qsun.serve.api.bodies.sampling import SamplingBody

_FunctionName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]


class Function(Body):
    """parameters: a JSON schema of the arguments."""

    name: _FunctionName
    description: Text | None = None
    parameters: dict[str, Any] = {}
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class _Named(Body):
    name: _FunctionName


class NamedChoice(Body):
    """tool_choice: this function and no other."""

    type: Literal["function"] = "function"
    function: _Named


class JsonSchema(Body):
    name: Name | None = None
    description: Text | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: Flag | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise wrong("response_format", "response_format json_schema needs the field json_schema")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must satisfy; None: any text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.definition
        return {"type": "object"} if self.type == "json_object" else None


@cache
def _rendering_parameters() -> frozenset[str]:
    """Parameters of the function that renders. A client's `chat_template` would be a program that the server runs."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}


class Conversation(Body):
    """Messages, and how they become a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    tools: Annotated[list[Tool], Field(max_length=MOST_CALLS)] = []
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag = False
    chat_template_kwargs: dict[str, Any] = {}

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        name = next((name for name in given if name in _rendering_parameters()), None)
        if name is not None:
            message = (
                f"chat_template_kwargs.{name} is not a variable of the template but says how it is rendered; leave it "
                "out, or use the request's own field"
            )
            raise wrong("chat_template_kwargs", message)
        return given

    @model_validator(mode="after")
    def _answers_follow_calls(self) -> "Conversation":
        called: set[str] = set()
        for place, message in enumerate(self.messages):
            called |= {call.id for call in message.tool_calls}
            if message.role == "tool" and message.tool_call_id is not None and message.tool_call_id not in called:
                where = f"messages.{place}.tool_call_id"
                raise wrong(where, f"{where} {message.tool_call_id!r} does not answer a call of an earlier message")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("continue_final_message", "continue_final_message and add_generation_prompt cannot be combined")
        return self

    def template_arguments(self) -> dict[str, Any]:
        """Return the arguments of `chat_tokens` beside the tokenizer and the messages."""
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]
        prompt = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return {
            "tools": tools or None,
            "add_generation_prompt": prompt,
            "continue_final_message": self.continue_final_message,
            "template_args": self.chat_template_kwargs or None,
        }


class ChatBody(SamplingBody, Conversation):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": ({},),
        "modalities": (["text"], []),
        "web_search_options": (),
        "chat_template": ("",),
        "documents": ([],),
        "echo": (False,),
        "best_of": (1,),
    }

    max_completion_tokens: Positive | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: Flag = True

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _is_possible(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools]
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise wrong("tool_choice", f"tool_choice {self.tool_choice.function.name!r} is not in tools")
        if self.tool_choice == "required" and not names:
            raise wrong("tool_choice", "tool_choice required needs tools")
        if self.schema_of_answer is not None and self.forced_tools:
            raise wrong("response_format", "response_format and a forced tool_choice cannot be combined")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.schema_of_answer

    @property
    def usable_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which the answer must be a call; none where the model may choose."""
        if isinstance(self.tool_choice, NamedChoice):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    def template_arguments(self) -> dict[str, Any]:
        return super().template_arguments() | ({"tools": None} if self.tool_choice == "none" else {})
