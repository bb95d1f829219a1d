"""Ending asyncio tasks for sure."""

import asyncio
from collections.abc import Collection
from typing import Any

_AGAIN_SECONDS = 0.1


async def end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until they are over.

    One cancellation may get lost: before Python 3.12 `asyncio.wait_for` swallows it where what it waits for is ready at
    the same moment. A task that went on like that would hold a worker for a client that has left.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
