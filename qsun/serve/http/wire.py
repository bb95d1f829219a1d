"""OpenAI's wire format: server-sent events, token counts and errors, as servers write them and clients read them."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

DONE = b"[DONE]"
DONE_EVENT = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which readers of server-sent events skip
_LARGEST_EVENT_BYTES = 1 << 24
_MOST_TOKENS = 1 << 40  # more than any answer has
_TEXT_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls")


class BrokenStream(Exception):
    """What a server sends is not a valid answer, or not a whole one."""


async def data_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the data of each event as soon as it is whole, without framing, comments and other fields.

    Raises:
        BrokenStream: an event that is larger than 16 MiB, or a stream that ends inside one.
    """
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(rest) > _LARGEST_EVENT_BYTES:
            raise BrokenStream("an event is larger than 16 MiB")
        for event in whole:
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data:
                yield data
    if rest.strip():
        raise BrokenStream("the stream ends inside an event")


def parse_event(data: bytes) -> dict[str, Any]:
    """Return an event's JSON object. Raises BrokenStream for anything else."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise BrokenStream("an event is not JSON") from None
    if not isinstance(event, dict):
        raise BrokenStream("an event is not a JSON object")
    return event


def encode_event(event: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return a server-sent event, ASCII only: some readers take U+2028 for the end of a line."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def usage_count(answer: Mapping[str, Any], name: str) -> int | None:
    """Return `usage[name]` of an answer or event, such as completion_tokens; None where it has none.

    Raises:
        BrokenStream: not a number of tokens.
    """
    usage = answer.get("usage")
    if usage is None:
        return None
    count = usage.get(name) if isinstance(usage, Mapping) else usage
    if count is not None and not (type(count) is int and 0 <= count <= _MOST_TOKENS):
        raise BrokenStream(f"usage.{name} {count!r:.40} is not a number of tokens")
    return count


def tokens_in(event: Mapping[str, Any]) -> int:
    """Return the tokens that an event brings: those that it lists, or one for each choice that has text.

    Raises:
        BrokenStream: choices of another shape than OpenAI's.
    """
    count = 0
    try:
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or any(delta.get(field) for field in _TEXT_FIELDS)
            count += len(choice.get("token_ids") or ()) or bool(text)
    except (AttributeError, TypeError):
        raise BrokenStream("choices are not a list of objects") from None
    return count


def error_message(answer: Mapping[str, Any]) -> str | None:
    """Return the error of an answer or event as one line of at most 200 characters; None where it has none."""
    error = answer.get("error")
    if error is None:
        return None
    message = error.get("message") if isinstance(error, Mapping) else error
    return " ".join(str(message).split())[:200]
