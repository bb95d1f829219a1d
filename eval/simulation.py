"""A discrete-event simulation of prefill and decode workers that serve several models.

`simulate(trace, system, curves)` replays a trace of requests and gives every request's times. Nothing in it is random
but the choices of the `power_of_two` policy, which are seeded: the same arguments give the same times.

What happens to a request of n prompt tokens and m output tokens (the seam of qsun):
1. It waits for a prefill worker of its model, first come first served, which reads n - 1 tokens (`curves.prefill`).
   Where the system has no prefill workers, a decode worker reads them itself, see `DecodeWorker.prefill_tokens`.
2. `transfer_ms` later the policy chooses among the decode workers that serve its model. There it waits for a place in
   the batch and for KV of n + m tokens, which it keeps to its end; nothing is evicted.
3. It joins between two steps and takes part in m of them. The first gives its first token and attends to n tokens.

A decode worker's step costs `curves.step(variant, rows, mean context of the rows)` and `step_overhead_ms`. All tokens
of a step come at its end.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qsun.errors import QsunError
from qsun.eval.curves import SUN, Curves, DoesNotFit
from qsun.eval.percentiles import spread
from qsun.eval.service_level import ServiceLevel
from qsun.eval.workload import Request

LEAST, POWER_OF_TWO, ROUND_ROBIN = "least_outstanding_tokens", "power_of_two", "round_robin"
POLICIES = (LEAST, POWER_OF_TWO, ROUND_ROBIN)


@dataclass(frozen=True)
class DecodeWorker:
    """One decode worker: a GPU, or the thread of an in-process engine.

    Attributes:
        variant: which step curve its decode modules have.
        models: that it serves.
        turns: one batch for each of its models, because each has a decode module of its own; a step then runs each of
            them once, one after the other. Otherwise one batch holds rows of all models: the shared decode module.
        max_batch: rows at once, of all its models together; those whose prompt it is still reading count.
        max_batch_per_model: rows of one model at once.
        kv_tokens: prompt and output tokens of its rows at once.
        prefill_tokens: 0 where prompts are read elsewhere. Else this worker reads them itself, as qsun's in-process
            engine: a step is first up to so many prompt tokens, and then the decode step of all running rows, those
            whose prompt has just been completed included. Whole prompts of one model are read side by side.
        fair: waiting requests of the least served model are admitted first, instead of in order of arrival.
        padded: a step attends in every row to as many tokens as the longest row has, as the in-process engine's does;
            `curves.step` is then given the longest context instead of the mean, and each row takes as much of
            `kv_tokens` as the longest one needs. With `turns` each batch has an equal share of them.
    """

    models: tuple[str, ...]
    variant: str = SUN
    turns: bool = False
    max_batch: int = 64
    max_batch_per_model: int | None = None
    kv_tokens: int | None = None
    prefill_tokens: int = 0
    fair: bool = False
    padded: bool = False


@dataclass(frozen=True)
class System:
    """Workers and what joins them.

    Attributes:
        prefill: model -> prefill workers of its own; empty where decode workers read prompts themselves.
        policy: of the router, among decode workers that serve the model: the least outstanding tokens (prompt and
            output of requests sent there and not finished), the lesser of two drawn at random, or round robin by model.
        transfer_ms: from the end of a prefill until its KV is at the decode worker; it keeps neither of them busy.
        step_overhead_ms: added to each step of a decode worker.
    """

    name: str
    decode: tuple[DecodeWorker, ...]
    prefill: Mapping[str, int] = field(default_factory=dict)
    policy: str = LEAST
    transfer_ms: float = 0.0
    step_overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.decode:
            raise QsunError(f"system {self.name} has no decode workers; give 1 or more")
        if self.policy not in POLICIES:
            raise QsunError(f"policy {self.policy!r} is not known; use one of {', '.join(POLICIES)}")
        for worker in self.decode:
            sizes = (worker.max_batch, worker.max_batch_per_model or 1, worker.kv_tokens or 1)
            if min(sizes) < 1:
                raise QsunError(f"system {self.name}: a decode worker with a limit of {min(sizes)}; use 1 or more")
            if not self.prefill and worker.prefill_tokens < 1:
                raise QsunError(f"system {self.name} reads prompts nowhere; give prefill workers or prefill_tokens")

    @property
    def workers(self) -> int:
        return len(self.decode) + sum(self.prefill.values())


@dataclass
class Times:
    """One request in seconds from the start of the trace. worker: index of its decode worker."""

    request: Request
    prefilled: float = 0.0
    joined: float = 0.0
    first: float = 0.0
    last: float = 0.0
    worker: int = -1

    @property
    def ttft(self) -> float:
        return self.first - self.request.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds between tokens; None for a single one."""
        tokens = self.request.output_tokens
        return (self.last - self.first) / (tokens - 1) if tokens > 1 else None


@dataclass(frozen=True)
class Load:
    """What one worker did. busy: seconds; rows: of all its steps together; beyond: steps outside the curves."""

    busy: float
    steps: int = 0
    rows: int = 0
    beyond: int = 0


@dataclass(frozen=True)
class Result:
    """Times of every request in the order of the trace, and the load of every worker.

    Statistics leave out the first `warm_up` share of the requests, which met an empty system.
    """

    system: System
    times: Sequence[Times]
    decode: Sequence[Load]
    prefill: Mapping[str, Sequence[Load]]
    warm_up: float = 0.0

    @property
    def measured(self) -> Sequence[Times]:
        return self.times[int(self.warm_up * len(self.times)) :]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max(times.last for times in self.times) - self.times[0].request.arrival

    def tokens_per_s(self) -> float:
        """Output tokens of all requests over `seconds`."""
        return sum(times.request.output_tokens for times in self.times) / self.seconds

    def steady_tokens_per_s(self) -> float:
        """Output tokens between the first measured arrival and the last arrival, over that time: no ramp, no tail.

        A request's tokens count as spread evenly from its first to its last. All arriving at once: tokens_per_s().
        """
        begin, end = self.measured[0].request.arrival, self.times[-1].request.arrival
        if end <= begin:
            return self.tokens_per_s()
        return sum(_between(times, begin, end) for times in self.times) / (end - begin)

    def tpots_ms(self) -> list[float]:
        return [1000 * tpot for times in self.measured if (tpot := times.tpot) is not None]

    def ttfts_ms(self) -> list[float]:
        return [1000 * times.ttft for times in self.measured]

    def goodput(self, level: ServiceLevel) -> float:
        """Share of measured requests that kept the level."""
        tpots = (times.tpot for times in self.measured)
        pairs = ((1000 * t.ttft, tpot and 1000 * tpot) for t, tpot in zip(self.measured, tpots, strict=True))
        return level.count(pairs) / len(self.measured)

    def utilisation(self) -> float:
        """Mean share of `seconds` in which a decode worker was busy."""
        return statistics.fmean(load.busy for load in self.decode) / self.seconds

    def mean_batch(self) -> float:
        """Rows of a step, over all steps of all workers."""
        return sum(load.rows for load in self.decode) / max(1, sum(load.steps for load in self.decode))

    def beyond(self) -> float:
        """Share of decode steps with a batch or context larger than the curves have."""
        return sum(load.beyond for load in self.decode) / max(1, sum(load.steps for load in self.decode))

    def summary(self, level: ServiceLevel) -> dict[str, Any]:
        """For reports; rates are steady ones."""
        tokens, served = self.steady_tokens_per_s(), self.goodput(level)
        return {
            "system": self.system.name,
            "decode_workers": len(self.system.decode),
            "workers": self.system.workers,
            "requests": len(self.times),
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s(),
            "steady_tokens_per_s": tokens,
            "tokens_per_s_per_decode_worker": tokens / len(self.system.decode),
            "tokens_per_s_per_worker": tokens / self.system.workers,
            "ttft_ms": spread(self.ttfts_ms()),
            "tpot_ms": spread(self.tpots_ms()),
            "goodput": served,
            "utilisation": self.utilisation(),
            "utilisation_by_worker": [load.busy / self.seconds for load in self.decode],
            "mean_batch": self.mean_batch(),
            "steps_beyond_curves": self.beyond(),
        }


def _between(times: Times, begin: float, end: float) -> float:
    """Tokens of a request from `begin` to `end`."""
    if times.request.output_tokens == 1 or times.last == times.first:
        return times.request.output_tokens * (begin <= times.last <= end)
    inside = max(0.0, min(times.last, end) - max(times.first, begin))
    return times.request.output_tokens * inside / (times.last - times.first)


def simulate(
    trace: Sequence[Request], system: System, curves: Curves, *, warm_up: float = 0.0, seed: int = 0
) -> Result:
    """Replay a trace.

    Args:
        trace: requests in order of arrival.
        warm_up: share of the requests, from the first, that statistics leave out.
        seed: of the power_of_two policy.
    Raises:
        DoesNotFit: a request that a worker of its model can never hold.
        QsunError: an empty or unordered trace, or a model that nobody serves.
    """
    try:
        from qsun.eval.simulation_run import Run
    except ModuleNotFoundError as missing:
        raise QsunError(f"a simulation needs {missing.name}; pip install 'qsun[simulate]'") from None
    if not trace:
        raise QsunError("the trace has no requests; give 1 or more")
    if any(later.arrival < earlier.arrival for earlier, later in itertools.pairwise(trace)):
        raise QsunError("the trace is not in order of arrival; sort it")
    for model in {request.model for request in trace}:
        if not any(model in worker.models for worker in system.decode):
            raise QsunError(f"no decode worker of {system.name} serves model {model!r}")
        if system.prefill and system.prefill.get(model, 0) < 1:
            raise QsunError(f"no prefill worker of {system.name} serves model {model!r}")
    for worker in system.decode:
        limit = worker.kv_tokens
        if limit is not None and worker.padded and worker.turns:
            limit //= len(worker.models)
        largest = max((r for r in trace if r.model in worker.models), key=_tokens, default=None)
        if limit is not None and largest and _tokens(largest) > limit:
            raise DoesNotFit(f"{largest} takes {_tokens(largest)} tokens of KV; a decode worker has {limit}")
    run = Run(trace, system, curves, seed)
    return Result(system, run.times, run.decode_loads(), run.prefill_loads(), warm_up)


def _tokens(request: Request) -> int:
    return request.prompt_tokens + request.output_tokens
