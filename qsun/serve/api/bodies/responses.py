"""POST /v1/responses, as another way to write a chat: text and functions, and nothing is stored."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import PrivateAttr, ValidationError, model_validator

from qsun.serve.api.bodies.chat import ChatBody
from qsun.serve.api.bodies.fields import Body, Name, Text, wrong

_AS_IN_CHATS = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "stream", "parallel_tool_calls", "user")
_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}


class ResponsesBody(Body):
    """Other fields are those of chats, and checked as there."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "previous_response_id": ("",),
        "conversation": (),
        "prompt": (),
        "background": (False,),
        "top_logprobs": (0,),
        "max_tool_calls": (),
    }

    model: Name
    input: Text | list[dict[str, Any]]
    instructions: Text | None = None
    max_output_tokens: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    seed: Any = None
    stream: Any = None
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    text: dict[str, Any] = {}
    user: Any = None
    # these change no answer
    metadata: dict[str, Any] = {}
    store: Any = None
    include: Any = None
    reasoning: Any = None
    truncation: Any = None
    service_tier: Any = None
    stream_options: Any = None
    _chat: ChatBody = PrivateAttr()

    @model_validator(mode="after")
    def _is_a_chat(self) -> "ResponsesBody":
        values = {name: getattr(self, name) for name in _AS_IN_CHATS}
        values |= {
            "messages": list(self._messages()),
            "max_tokens": self.max_output_tokens,
            "tools": [_tool(tool) for tool in self.tools],
            "tool_choice": _choice(self.tool_choice),
            "response_format": _format(self.text.get("format")),
        }
        try:
            self._chat = ChatBody.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            first_place, *rest = first["loc"] or first.get("ctx", {}).get("field", "").split(".")
            field = ".".join(map(str, (_NAMES.get(str(first_place), first_place), *rest)))
            raise wrong(field, f"{field}: {first['msg'].removeprefix('Value error, ')}") from None
        return self

    def as_chat(self) -> ChatBody:
        return self._chat

    def settings(self) -> dict[str, Any]:
        """Return what an answer repeats of its request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "parallel_tool_calls": self._chat.parallel_tool_calls,
            "temperature": self.temperature,
            "text": self.text or {"format": {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools,
            "top_p": self.top_p,
            "store": False,
        }

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        calls: list[dict[str, Any]] = []
        for place, item in enumerate(items):
            kind = item.get("type", "message")
            if kind == "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                calls.append({"id": item.get("call_id"), "function": function})
                continue
            if calls:
                yield {"role": "assistant", "tool_calls": calls}
                calls = []
            if kind == "function_call_output":
                yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            elif kind == "message":
                yield {key: value for key, value in item.items() if key in ("role", "content")}
            elif kind != "reasoning":
                raise wrong(f"input.{place}.type", f"input.{place}.type {kind!r:.80} is not supported; use text")
        if calls:
            yield {"role": "assistant", "tool_calls": calls}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a function in the form that chats have; other kinds of tools stay as they are, and are refused there."""
    if tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _format(form: Any) -> Any:
    if isinstance(form, dict) and form.get("type") == "json_schema" and "schema" in form:
        return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
    return form
