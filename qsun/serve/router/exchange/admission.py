"""The number of requests that run at once and that wait for a permit, shared fairly between models."""

import asyncio
import math
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qsun.serve.http.errors import busy


class Admission:
    """Permits for requests. A free one goes to the model with the fewest of them, within a model in order of arrival.

    A queue that is full drops the latest request of the model that has the most waiting, so that a burst of one model
    neither delays nor displaces the requests of the others.

    Attributes:
        most_running, most_waiting, wait_seconds: limits; `limit` changes them.
    """

    def __init__(self, most_running: int, most_waiting: int, wait_seconds: float = math.inf):
        self._running: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        self.limit(most_running, most_waiting, wait_seconds)

    def limit(self, most_running: int, most_waiting: int, wait_seconds: float = math.inf) -> None:
        """Set other limits. More permits admit waiting requests; fewer end no running request."""
        self.most_running, self.most_waiting, self.wait_seconds = most_running, most_waiting, wait_seconds
        self._admit()

    @property
    def running(self) -> int:
        return self._running.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def permit(self, model: str = "", within: float = math.inf) -> AsyncIterator[None]:
        """Hold a permit in the block.

        Args:
            within: seconds that the caller waits at most, below the limit of the queue.
        Raises:
            HttpError: 429 if the queue is full or the wait too long.
        """
        await self._enter(model, min(within, self.wait_seconds))
        try:
            yield
        finally:
            self._release(model)

    async def _enter(self, model: str, seconds: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(model, deque()).append(turn)
        self._admit()
        if self.waiting > self.most_waiting:
            self._drop_one()
        try:
            done, _ = await asyncio.wait([turn], timeout=seconds if math.isfinite(seconds) else None)
        except asyncio.CancelledError:
            self._leave(model, turn)
            raise
        if not done:
            self._leave(model, turn)
            raise busy(f"no slot within {seconds:g} seconds; try again later", seconds)
        turn.result()  # raises for a request that was dropped

    def _admit(self) -> None:
        while self._queues and self.running < self.most_running:
            model = min(self._queues, key=lambda name: self._running[name])
            self._running[model] += 1
            self._take(model, 0).set_result(None)
            if model in self._queues:
                self._queues[model] = self._queues.pop(model)  # to the end: models with equal permits take turns

    def _drop_one(self) -> None:
        model = max(self._queues, key=lambda name: len(self._queues[name]))
        error = busy(f"{self.running} requests run and {self.most_waiting} wait; try again later", 1)
        self._take(model, -1).set_exception(error)

    def _take(self, model: str, index: int) -> "asyncio.Future[None]":
        """Remove a request from its queue."""
        queue = self._queues[model]
        turn = queue[index]
        del queue[index]
        if not queue:
            del self._queues[model]
        return turn

    def _leave(self, model: str, turn: "asyncio.Future[None]") -> None:
        if not turn.done():
            self._take(model, self._queues[model].index(turn))
        elif turn.exception() is None:  # its permit came at the same moment
            self._release(model)

    def _release(self, model: str) -> None:
        self._running[model] -= 1
        if not self._running[model]:
            del self._running[model]  # or a name in a file that changes often would stay
        self._admit()
