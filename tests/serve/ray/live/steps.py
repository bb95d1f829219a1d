"""Times of a pretend vLLM as an engine has them: prompts one after the other, and decode steps of a whole batch.

They are what qsun's simulator is given, so that the rest, which is ours and Ray's, can be compared with it.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.serve.fake_vllm import token_count

_row: contextvars.ContextVar["Row"] = contextvars.ContextVar("row")


@dataclass(frozen=True)
class Times:
    """Seconds of a step, `step` and `row` for each of its rows, at most `most_rows`; and of a prompt's pass."""

    step: float
    row: float
    most_rows: int
    prefill: float
    prompt_token: float

    def of_step(self, rows: int) -> float:
        return self.step + self.row * rows

    def of_prompt(self, tokens: int) -> float:
        return self.prefill + self.prompt_token * tokens if tokens else 0.0


class Row:
    """A request in a batch: how many tokens it has yet to get, and those that it has got and not sent."""

    def __init__(self, left: int):
        self.left, self.ready = left, asyncio.Semaphore(0)


class Timed:
    """One engine. role: prefill or decode."""

    def __init__(self, times: Times, role: str):
        self._times, self._role = times, role
        self._prompts = asyncio.Lock()  # which is fair
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._running: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def request(self, body: dict, prompt: str | tuple[int, ...]) -> AsyncIterator[None]:
        """A request is in the engine within the block."""
        if self._role == "prefill":  # the seam: it reads all tokens but the last
            async with self._prompts:
                await asyncio.sleep(self._times.of_prompt(token_count(prompt) - 1))
            yield
            return
        row = Row(body["max_tokens"])
        self._waiting.append(row)
        _row.set(row)
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._steps())
        try:
            yield
        finally:
            row.left = 0

    async def token(self) -> None:
        await _row.get().ready.acquire()

    async def _steps(self) -> None:
        """Step while there are rows, on time also where this process gets its turn late."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._join():
            now += self._times.of_step(len(self._rows))
            await asyncio.sleep(max(0.0, now - loop.time()))
            for row in self._rows:
                row.left -= 1
                row.ready.release()

    def _join(self) -> int:
        self._rows = [row for row in self._rows if row.left > 0]
        while self._waiting and len(self._rows) < self._times.most_rows:
            if (row := self._waiting.popleft()).left > 0:
                self._rows.append(row)
        return len(self._rows)
