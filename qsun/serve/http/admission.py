"""How many requests are at work at once, and how many wait for a place; the rest is turned away."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qsun.serve.http.errors import busy


class Admission:
    """Places for requests, given in the order in which they came.

    Attributes:
        most_running, most_waiting, wait_seconds: bounds; `bound` changes them.
        running: requests that have a place.
    """

    def __init__(self, most_running: int, most_waiting: int, wait_seconds: float):
        self.running = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self.bound(most_running, most_waiting, wait_seconds)

    def bound(self, most_running: int, most_waiting: int, wait_seconds: float) -> None:
        """Other bounds from now on. More places let in whoever waits; fewer send nobody away who has one."""
        self.most_running, self.most_waiting, self.wait_seconds = most_running, most_waiting, wait_seconds
        self._let_in()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def place(self, within: float = math.inf) -> AsyncIterator[None]:
        """Hold a place in the block. Raises HttpError 429 where the queue is full or the wait too long.

        Args:
            within: seconds that the caller waits at most, whatever the queue allows.
        """
        await self._enter(min(within, self.wait_seconds))
        try:
            yield
        finally:
            self.running -= 1
            self._let_in()

    async def _enter(self, seconds: float) -> None:
        if self.running < self.most_running and not self._queue:
            self.running += 1
            return
        if len(self._queue) >= self.most_waiting:
            raise busy(f"{self.running} requests are at work and {len(self._queue)} wait; try again later", 1)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            done, _ = await asyncio.wait([turn], timeout=seconds if math.isfinite(seconds) else None)
        except asyncio.CancelledError:
            self._give_up(turn)
            raise
        if not done:
            self._give_up(turn)
            raise busy(f"no place within {seconds:g} seconds; try again later", seconds)

    def _give_up(self, turn: "asyncio.Future[None]") -> None:
        if turn.done():  # its place came at the same moment
            self.running -= 1
        else:
            self._queue.remove(turn)
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and self.running < self.most_running:
            self.running += 1
            self._queue.popleft().set_result(None)
