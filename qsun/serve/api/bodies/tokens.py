"""POST /tokenize and /detokenize."""

from pydantic import model_validator

from qsun.serve.api.bodies.chat import Conversation
from qsun.serve.api.bodies.fields import Body, Flag, Name, Text, Tokens, wrong
from qsun.serve.api.bodies.messages import ChatMessage


class TokenizeBody(Conversation):
    """A prompt, or the messages of a chat."""

    model: Name | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] = []
    add_special_tokens: Flag = True

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (not self.messages):
            raise wrong("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(Body):
    model: Name | None = None
    tokens: Tokens
