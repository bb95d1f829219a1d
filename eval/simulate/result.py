"""The result of a simulation: times of every request, load of every worker, and statistics of both."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qsun.eval.load.percentiles import spread
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.load.workload import TracedRequest
from qsun.eval.simulate.system import System


@dataclass
class RequestTimes:
    """Times of one request, in seconds from the start of the trace. worker: index of its decode worker."""

    request: TracedRequest
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
        """Seconds between tokens; None for a single token."""
        tokens = self.request.output_tokens
        return (self.last - self.first) / (tokens - 1) if tokens > 1 else None


@dataclass(frozen=True)
class WorkerLoad:
    """Work of one worker. busy: seconds; rows: summed over its steps; beyond: steps outside the measured curves."""

    busy: float
    steps: int = 0
    rows: int = 0
    beyond: int = 0


@dataclass(frozen=True)
class SimulationResult:
    """Times of every request in the order of the trace, and the load of every worker.

    Statistics leave out the first `warm_up` share of the requests, which met an empty system.
    """

    system: System
    times: Sequence[RequestTimes]
    decode: Sequence[WorkerLoad]
    prefill: Mapping[str, Sequence[WorkerLoad]]
    warm_up: float = 0.0

    @property
    def measured(self) -> Sequence[RequestTimes]:
        return self.times[int(self.warm_up * len(self.times)) :]

    @property
    def seconds(self) -> float:
        """Seconds from the first arrival to the last token."""
        return max(times.last for times in self.times) - self.times[0].request.arrival

    def tokens_per_s(self) -> float:
        """Return the output tokens of all requests over `seconds`."""
        return sum(times.request.output_tokens for times in self.times) / self.seconds

    def steady_tokens_per_s(self) -> float:
        """Return output tokens a second between the first measured arrival and the last one, without ramp and tail.

        A request's tokens are spread evenly from its first to its last. If all arrive at once: tokens_per_s().
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
        """Return the share of measured requests within the service level."""
        tpots = (times.tpot for times in self.measured)
        pairs = ((1000 * t.ttft, tpot and 1000 * tpot) for t, tpot in zip(self.measured, tpots, strict=True))
        return level.count(pairs) / len(self.measured)

    def utilisation(self) -> float:
        """Return the mean share of `seconds` in which a decode worker was busy."""
        return statistics.fmean(load.busy for load in self.decode) / self.seconds

    def mean_batch(self) -> float:
        """Return the mean rows of a step, over all steps of all workers."""
        return sum(load.rows for load in self.decode) / max(1, sum(load.steps for load in self.decode))

    def beyond(self) -> float:
        """Return the share of decode steps with a batch or context larger than the measured ones."""
        return sum(load.beyond for load in self.decode) / max(1, sum(load.steps for load in self.decode))

    def summary(self, level: ServiceLevel) -> dict[str, Any]:
        """Return the numbers for reports."""
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


def _between(times: RequestTimes, begin: float, end: float) -> float:
    """Return the tokens of a request from `begin` to `end`."""
    if times.request.output_tokens == 1 or times.last == times.first:
        return times.request.output_tokens * (begin <= times.last <= end)
    inside = max(0.0, min(times.last, end) - max(times.first, begin))
    return times.request.output_tokens * inside / (times.last - times.first)
