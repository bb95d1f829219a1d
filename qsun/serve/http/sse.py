"""Server-sent events of a worker, one at a time: each is handed on as soon as it is whole."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

DONE = b"[DONE]"
_LARGEST_EVENT_BYTES = 1 << 24


class BrokenStream(Exception):
    """What a worker sends is no sound stream of events."""


async def data_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each event, without its framing. Comments and other fields are left out.

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
    """An event's JSON object. Raises BrokenStream where it is none."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        raise BrokenStream("an event is not JSON") from None
    if not isinstance(event, dict):
        raise BrokenStream("an event is no JSON object")
    return event


def encode_event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
