"""Messages of a conversation, as clients send them and as chat templates want them."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from qsun.serve.api.bodies.fields import Body, Name, Text

_ROLES = {"developer": "system"}  # OpenAI's newer name, which few templates know
MOST_CALLS = 128


def _parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class TextPart(Body):
    """input_text and output_text: the Responses API's names."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class CalledFunction(Body):
    """arguments: a JSON object in a string, as models write it."""

    name: Name
    arguments: Text = ""

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, arguments: Any) -> Any:
        return json.dumps(arguments) if isinstance(arguments, dict) else arguments

    @field_validator("arguments")
    @classmethod
    def _holds_an_object(cls, arguments: str) -> str:
        try:
            sound = not arguments.strip() or isinstance(json.loads(arguments), dict)
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise ValueError("it is not a JSON object")
        return arguments


class ToolCall(Body):
    """A call that the assistant made in an earlier turn."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A turn of a conversation; the chat template decides which roles there are."""

    role: Annotated[str, Field(max_length=64)]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])] = []
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS)] = []
    tool_call_id: Name | None = None

    def plain(self) -> dict[str, Any]:
        """Return it for a chat template: content is one string."""
        message: dict[str, Any] = {"role": _ROLES.get(self.role, self.role)}
        message["content"] = "".join(part.text for part in self.content)
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in optional.items() if value is not None}
