"""The load generator: requests that are sent when they are due, whatever the server does.

An open loop never waits for an answer before it sends the next request, so that a server that stalls meets the load
that it would meet in use; latencies count from when a request was due, which excludes coordinated omission. A closed
loop keeps a number of requests in flight and finds the highest throughput; its latencies are those of saturation.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import httpx

from qsun.eval.load.client import NOT_SENT, PlannedRequest, Record, Target, send
from qsun.progress import Progress


class _Tally:
    """Counts for the progress line."""

    def __init__(self, total: int, progress: Progress):
        self._total, self._progress = total, progress
        self.in_flight = self.done = self.failed = 0

    def ended(self, record: Record) -> None:
        self.done += 1
        self.failed += bool(record.error)
        self._progress(f"{self.in_flight} in flight, {self.failed} failed", self.done, self._total)


async def open_loop(
    target: Target, planned: Sequence[PlannedRequest], max_in_flight: int, progress: Progress
) -> list[Record]:
    """Send every request when it is due.

    Args:
        planned: in order of arrival.
        max_in_flight: requests beyond it are recorded as not sent; none is ever delayed.
    Returns:
        A record of each request, in the same order.
    """
    tally = _Tally(len(planned), progress)
    async with target.client() as client:
        started = time.perf_counter()
        running: list[asyncio.Task[Record]] = []
        for one in planned:
            await asyncio.sleep(max(0.0, one.arrival - (time.perf_counter() - started)))
            if tally.in_flight >= max_in_flight:
                running.append(asyncio.create_task(_unsent(one, tally)))
                continue
            tally.in_flight += 1
            running.append(asyncio.create_task(_counted(client, target, one, started, tally)))
        return await asyncio.gather(*running)


async def closed_loop(
    target: Target, planned: Sequence[PlannedRequest], concurrency: int, progress: Progress
) -> list[Record]:
    """Keep `concurrency` requests in flight, each due when it is sent. Returns records in the order of sending."""
    tally = _Tally(len(planned), progress)
    waiting = deque(planned)
    records: list[Record] = []
    async with target.client() as client:
        started = time.perf_counter()

        async def work() -> None:
            while waiting:
                one = waiting.popleft()
                now = time.perf_counter() - started
                due = replace(one, arrival=now)
                tally.in_flight += 1
                records.append(await _counted(client, target, due, started, tally))

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return sorted(records, key=lambda record: record.arrival)


async def _counted(
    client: httpx.AsyncClient, target: Target, one: PlannedRequest, started: float, tally: _Tally
) -> Record:
    record = await send(client, target, one, started)
    tally.in_flight -= 1
    tally.ended(record)
    return record


async def _unsent(one: PlannedRequest, tally: _Tally) -> Record:
    record = Record(one.arrival, one.model, one.warm_up, error=NOT_SENT)
    tally.ended(record)
    return record
