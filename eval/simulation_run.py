"""The processes of a simulation: arrivals, prefill workers, the router, decode workers. See qsun.eval.simulation."""

import heapq
import random
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from qsun.eval.curves import Curves
from qsun.eval.simulation import POWER_OF_TWO, ROUND_ROBIN, DecodeWorker, Load, System, Times
from qsun.eval.workload import Request


class Run:
    """One simulation, run to its end by the constructor."""

    def __init__(self, trace: Sequence[Request], system: System, curves: Curves, seed: int):
        self.env: Any = simpy.Environment()
        self.system, self.curves = system, curves
        self.times = [Times(request) for request in trace]
        self._random = random.Random(seed)
        self._turn = dict.fromkeys((request.model for request in trace), 0)
        self._workers = [_Decoding(self, index, worker) for index, worker in enumerate(system.decode)]
        self._serving = {
            model: [worker for worker in self._workers if model in worker.kind.models] for model in self._turn
        }
        self._prompts: dict[str, Any] = {model: simpy.Store(self.env) for model in system.prefill}
        self._prefill_busy = {model: [0.0] * count for model, count in system.prefill.items()}
        for model, count in system.prefill.items():
            for index in range(count):
                self.env.process(self._prefill(model, index))
        for worker in self._workers:
            self.env.process(worker.run())
        self.env.process(self._arrive())
        self.env.run()

    def decode_loads(self) -> list[Load]:
        return [Load(w.busy, w.steps, w.rows, w.beyond) for w in self._workers]

    def prefill_loads(self) -> dict[str, list[Load]]:
        return {model: [Load(busy) for busy in loads] for model, loads in self._prefill_busy.items()}

    def _arrive(self) -> Generator[Any, Any, None]:
        for times in self.times:
            delay = times.request.arrival - self.env.now
            if delay > 0:
                yield self.env.timeout(delay)
            if self.system.prefill:
                self._prompts[times.request.model].put(times)
            else:
                self._route(times)

    def _prefill(self, model: str, index: int) -> Generator[Any, Any, None]:
        while True:
            times = yield self._prompts[model].get()
            seconds = self.curves.chunk(times.request.prompt_tokens - 1, 0)
            yield self.env.timeout(seconds)
            self._prefill_busy[model][index] += seconds
            times.prefilled = self.env.now
            if self.system.transfer_ms:
                self.env.process(self._transfer(times))
            else:
                self._route(times)

    def _transfer(self, times: Times) -> Generator[Any, Any, None]:
        yield self.env.timeout(self.system.transfer_ms / 1000)
        self._route(times)

    def _route(self, times: Times) -> None:
        model = times.request.model
        serving = self._serving[model]
        if self.system.policy == ROUND_ROBIN:
            chosen = serving[self._turn[model] % len(serving)]
            self._turn[model] += 1
        else:
            if self.system.policy == POWER_OF_TWO and len(serving) > 2:
                serving = self._random.sample(serving, 2)
            chosen = min(serving, key=lambda worker: worker.outstanding)
        chosen.submit(times)


class _Batch:
    """Rows that step together; their contexts only as a sum, and their ends in a heap."""

    def __init__(self) -> None:
        self.rows = self.context = self._step = 0
        self._ends: list[tuple[int, int, Times]] = []
        self._joined: list[Times] = []
        self._count = 0

    def join(self, times: Times) -> None:
        self.rows += 1
        self.context += times.request.prompt_tokens
        self._count += 1
        heapq.heappush(self._ends, (self._step + times.request.output_tokens, self._count, times))
        self._joined.append(times)

    def advance(self, now: float) -> list[Times]:
        """One step ends: every row has a token more. Gives the rows that are complete."""
        self._step += 1
        self.context += self.rows
        for times in self._joined:
            times.first = now
        self._joined.clear()
        ended = []
        while self._ends and self._ends[0][0] == self._step:
            times = heapq.heappop(self._ends)[2]
            times.last = now
            self.rows -= 1
            self.context -= times.request.prompt_tokens + times.request.output_tokens
            ended.append(times)
        return ended


@dataclass
class _Reading:
    times: Times
    done: int = 0

    @property
    def left(self) -> int:
        return self.times.request.prompt_tokens - 1 - self.done


class _Decoding:
    """A decode worker."""

    def __init__(self, run: Run, index: int, kind: DecodeWorker):
        self.kind = kind
        self._run, self._index = run, index
        self._waiting: dict[str, deque[tuple[int, Times]]] = {model: deque() for model in kind.models}
        self._submitted = 0
        self._held = dict.fromkeys(kind.models, 0)  # rows of each model, those whose prompt is being read included
        self._batches = {model: _Batch() for model in kind.models} if kind.turns else {"": _Batch()}
        self._order = deque(self._batches)  # whose turn is next
        self._reading: deque[_Reading] = deque()
        self._kv_tokens = 0
        self._wake: Any = None
        self.outstanding = 0
        self.busy, self.steps, self.rows, self.beyond = 0.0, 0, 0, 0

    def submit(self, times: Times) -> None:
        times.worker = self._index
        self.outstanding += _kv(times)
        self._submitted += 1
        self._waiting[times.request.model].append((self._submitted, times))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def run(self) -> Generator[Any, Any, None]:
        env = self._run.env
        while True:
            self._admit()
            seconds = self._read()
            batch = self._next_batch()
            if batch is None and not seconds:
                self._wake = env.event()
                yield self._wake
                continue
            if batch is not None:
                seconds += self._step_seconds(batch)
            yield env.timeout(seconds)
            self.busy += seconds
            for times in batch.advance(env.now) if batch else []:
                self._release(times)

    def _admit(self) -> None:
        """Take from the queue while there is room. What is first in the queue is not overtaken for want of KV."""
        while (model := self._next_model()) is not None:
            times = self._waiting[model][0][1]
            if self.kind.kv_tokens is not None and self._kv_tokens + _kv(times) > self.kind.kv_tokens:
                return
            self._waiting[model].popleft()
            if self.kind.fair:
                self._waiting[model] = self._waiting.pop(model)  # to the end of the rotation
            self._kv_tokens += _kv(times)
            self._held[model] += 1
            times.joined = self._run.env.now
            if self._run.system.prefill:
                self._batch_of(times).join(times)
            else:
                self._reading.append(_Reading(times))

    def _next_model(self) -> str | None:
        if sum(self._held.values()) >= self.kind.max_batch:
            return None
        limit = self.kind.max_batch_per_model or self.kind.max_batch
        able = [model for model, queue in self._waiting.items() if queue and self._held[model] < limit]
        if not able or self.kind.fair:
            return able[0] if able else None
        return min(able, key=lambda model: self._waiting[model][0][0])

    def _read(self) -> float:
        """Seconds of this step's prompt work; prompts that it ends join their batch."""
        budget, seconds = self.kind.prefill_tokens, 0.0
        while self._reading and (budget > 0 or not self._reading[0].left):
            reading = self._reading[0]
            tokens = min(budget, reading.left)
            seconds += self._run.curves.chunk(tokens, reading.done)
            reading.done += tokens
            budget -= tokens
            if not reading.left:
                self._reading.popleft()
                reading.times.prefilled = self._run.env.now + seconds
                self._batch_of(reading.times).join(reading.times)
        return seconds

    def _next_batch(self) -> _Batch | None:
        for _ in range(len(self._order)):
            batch = self._batches[self._order[0]]
            self._order.rotate(-1)
            if batch.rows:
                return batch
        return None

    def _step_seconds(self, batch: _Batch) -> float:
        context = batch.context / batch.rows
        self.steps += 1
        self.rows += batch.rows
        self.beyond += self._run.curves.beyond(self.kind.variant, batch.rows, context)
        return self._run.curves.step(self.kind.variant, batch.rows, context) + self._run.system.step_overhead_ms / 1000

    def _batch_of(self, times: Times) -> _Batch:
        return self._batches[times.request.model if self.kind.turns else ""]

    def _release(self, times: Times) -> None:
        self._held[times.request.model] -= 1
        self._kv_tokens -= _kv(times)
        self.outstanding -= _kv(times)


def _kv(times: Times) -> int:
    return times.request.prompt_tokens + times.request.output_tokens
