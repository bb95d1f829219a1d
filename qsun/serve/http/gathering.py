"""Pieces of a stream that are passed on together, which costs less than passing each on by itself."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

T = TypeVar("T")

_MOST = 256  # that are held back for a reader that does not take them


async def gathered(pieces: AsyncIterator[T], seconds: float) -> AsyncGenerator[list[T], None]:
    """Yield pieces in order, together with those that come within some seconds of the ones yielded before.

    The first one is yielded as soon as it is there, and an error of `pieces` is raised after all that came before it.

    Args:
        seconds: 0: each piece by itself.
    """
    if not seconds:
        async for piece in pieces:
            yield [piece]
        return
    found: list[T] = []
    arrived, taken = asyncio.Event(), asyncio.Event()

    async def collect() -> None:
        try:
            async for piece in pieces:
                found.append(piece)
                arrived.set()
                if len(found) >= _MOST:
                    taken.clear()
                    await taken.wait()
        finally:
            arrived.set()

    collecting = asyncio.create_task(collect())
    try:
        while await arrived.wait() and (found or not collecting.done()):
            together, found[:] = found[:], []
            arrived.clear()
            taken.set()
            if together:
                yield together
            await asyncio.wait([collecting], timeout=seconds)
            if found or collecting.done():
                arrived.set()
        await collecting
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
