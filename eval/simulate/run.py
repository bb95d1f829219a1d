"""The processes of a simulation: arrivals, prefill workers, the router, decode workers (simulation.py)."""

import random
from collections.abc import Generator, Sequence
from typing import Any

import simpy

from qsun.eval.load.workload import TracedRequest
from qsun.eval.simulate.batch import AdmissionQueue, KvBudget, PromptQueue, RowBatch, kv_tokens
from qsun.eval.simulate.curves import Curves
from qsun.eval.simulate.result import RequestTimes, WorkerLoad
from qsun.eval.simulate.system import POWER_OF_TWO, ROUND_ROBIN, DecodeWorker, System

Steps = Generator[Any, Any, None]  # what simpy runs as a process


class SimulationRun:
    """One simulation, run to its end by the constructor."""

    def __init__(self, trace: Sequence[TracedRequest], system: System, curves: Curves, seed: int):
        self.env: Any = simpy.Environment()
        self.system, self.curves = system, curves
        self.times = [RequestTimes(request) for request in trace]
        self._random = random.Random(seed)
        self._turn = dict.fromkeys((request.model for request in trace), 0)
        self._workers = [_DecodeProcess(self, index, worker) for index, worker in enumerate(system.decode)]
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

    def decode_loads(self) -> list[WorkerLoad]:
        return [WorkerLoad(w.busy, w.steps, w.rows, w.beyond) for w in self._workers]

    def prefill_loads(self) -> dict[str, list[WorkerLoad]]:
        return {model: [WorkerLoad(busy) for busy in loads] for model, loads in self._prefill_busy.items()}

    def _arrive(self) -> Steps:
        for times in self.times:
            delay = times.request.arrival - self.env.now
            if delay > 0:
                yield self.env.timeout(delay)
            if self.system.prefill:
                self._prompts[times.request.model].put(times)
            else:
                self._route(times)

    def _prefill(self, model: str, index: int) -> Steps:
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

    def _transfer(self, times: RequestTimes) -> Steps:
        yield self.env.timeout(self.system.transfer_ms / 1000)
        self._route(times)

    def _route(self, times: RequestTimes) -> None:
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


class _DecodeProcess:
    """A decode worker."""

    def __init__(self, run: SimulationRun, index: int, kind: DecodeWorker):
        self.kind = kind
        self._run, self._index = run, index
        self._waiting = AdmissionQueue(kind.models, kind.fair)
        self._held = dict.fromkeys(kind.models, 0)
        self._decoding = dict.fromkeys(kind.models, 0)
        self._prompts = PromptQueue(kind.prefill_tokens, run.curves)
        self._batches = {model: RowBatch() for model in kind.models} if kind.turns else {"": RowBatch()}
        self._apart = kind.turns and kind.padded
        self._room = KvBudget(kind.kv_tokens, kind.padded, len(kind.models) if self._apart else 1)
        self._wake: Any = None
        self.outstanding = 0
        self.busy, self.steps, self.rows, self.beyond = 0.0, 0, 0, 0

    def submit(self, times: RequestTimes) -> None:
        times.worker = self._index
        self.outstanding += kv_tokens(times)
        self._waiting.add(times, self._held)
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def run(self) -> Steps:
        env = self._run.env
        while True:
            self._admit()
            seconds = self._read()
            running = [batch for batch in self._batches.values() if batch.rows]
            if not running and not self._prompts:
                self._wake = env.event()
                yield self._wake
                continue
            seconds += sum(map(self._step_seconds, running))
            yield env.timeout(seconds)
            self.busy += seconds
            for model, rows in self._decoding.items() if self.kind.fair else ():
                self._waiting.charge(model, rows)
            for batch in running:
                for times in batch.advance(env.now):
                    self._release(times)

    def _admit(self) -> None:
        """Admit requests while there is room. A request that lacks KV is not overtaken."""
        while sum(self._held.values()) < self.kind.max_batch:
            times = self._waiting.next()
            if times is None or not self._room.fits(self._share(times), times):
                return
            self._waiting.take(times)
            self._room.take(self._share(times), times)
            self._held[times.request.model] += 1
            times.joined = self._run.env.now
            if self._run.system.prefill:
                self._join(times)
            else:
                self._prompts.add(times)

    def _read(self) -> float:
        """Return the seconds of this step's prompt work; completed prompts join their batch."""
        finished, seconds = self._prompts.turn()
        for times in finished:
            times.prefilled = self._run.env.now + seconds
            self._join(times)
        return seconds

    def _step_seconds(self, batch: RowBatch) -> float:
        context = batch.longest() if self.kind.padded else batch.context / batch.rows
        self.steps += 1
        self.rows += batch.rows
        self.beyond += self._run.curves.beyond(self.kind.variant, batch.rows, context)
        return self._run.curves.step(self.kind.variant, batch.rows, context) + self._run.system.step_overhead_ms / 1000

    def _join(self, times: RequestTimes) -> None:
        model = times.request.model
        self._decoding[model] += 1
        self._batches[model if self.kind.turns else ""].join(times)

    def _share(self, times: RequestTimes) -> str:
        """Return the share of the KV that a request takes from: the engine gives each of its batches one."""
        return times.request.model if self._apart else ""

    def _release(self, times: RequestTimes) -> None:
        self._held[times.request.model] -= 1
        self._decoding[times.request.model] -= 1
        self._room.give(self._share(times), times)
        self.outstanding -= kv_tokens(times)
