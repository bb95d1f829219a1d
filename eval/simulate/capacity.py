"""Searches over simulations: the highest rate that a system serves well, and the fewest workers that serve a rate."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qsun.errors import QsunError
from qsun.eval.load.percentiles import percentile
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.load.workload import TracedRequest, Workload
from qsun.eval.simulate.compared_systems import Deployment
from qsun.eval.simulate.curves import SUN, Curves, DoesNotFit
from qsun.eval.simulate.result import SimulationResult
from qsun.eval.simulate.simulation import simulate

_WARM_UP = 0.2  # share of a simulation's requests
_LIVES = 8  # a simulation lasts as many lifetimes of a request at a full decode worker, so that queues can grow
_KEEPS_UP = 0.97  # share of the arriving tokens; with less the queue grows
_TOLERANCE = 1.02  # of a rate that is found
_MOST_WORKERS = 4096


@dataclass(frozen=True)
class Scenario:
    """What all simulations of a comparison share.

    Attributes:
        target: share of the requests that must keep the service level.
        requests: of each simulation; more where they would arrive within a few of their own lifetimes. The first fifth
            is not measured.
    """

    workload: Workload
    curves: Curves
    deployment: Deployment
    level: ServiceLevel
    target: float = 0.95
    requests: int = 2000

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise QsunError(f"goodput target {self.target:g} is out of range; use more than 0, up to 1")
        if self.requests < 10:
            raise QsunError(f"requests {self.requests} is too few to measure; use 10 or more")

    def at_skew(self, skew: float) -> "Scenario":
        return replace(self, workload=replace(self.workload, skew=skew))

    def run(self, kind: str, workers: int, rate: float) -> SimulationResult:
        """Run one simulation."""
        trace = self.workload.trace(rate, max(self.requests, math.ceil(_LIVES * rate * self.life())))
        return self._simulate(kind, workers, trace, self.workload.shares(), _WARM_UP)

    def replay(self, kind: str, workers: int, trace: Sequence[TracedRequest]) -> SimulationResult:
        """Simulate a given trace and measure all of it; expected loads are the shares of its requests."""
        counts = Counter(request.model for request in trace)
        shares = {model: count / len(trace) for model, count in counts.items()}
        return self._simulate(kind, workers, trace, shares, 0.0)

    def _simulate(
        self, kind: str, workers: int, trace: Sequence[TracedRequest], shares: Mapping[str, float], warm_up: float
    ) -> SimulationResult:
        prefill = {} if self.deployment.prefill_tokens else self.deployment.prefill_for(trace, shares, self.curves)
        system = self.deployment.system(kind, workers, shares, prefill, self.curves)
        return simulate(trace, system, self.curves, warm_up=warm_up, seed=self.workload.seed)

    def serves(self, result: SimulationResult, tpot_ms: float = math.inf) -> bool:
        """Return whether enough requests keep the service level, the mean TPOT is kept, and no queue grows."""
        arrived = sum(t.request.output_tokens for t in result.measured)
        span = result.times[-1].request.arrival - result.measured[0].request.arrival
        return (
            result.goodput(self.level) >= self.target
            and mean_tpot_ms(result) <= tpot_ms
            and result.steady_tokens_per_s() * span >= _KEEPS_UP * arrived
        )

    def life(self) -> float:
        """Return the seconds that a request of mean length takes at a full bf16 worker."""
        outputs, step = _full_step(self.workload.sample(), self.curves, self.deployment.max_batch)
        return outputs * step


def default_level(
    requests: Sequence[TracedRequest], curves: Curves, max_batch: int, ttft_ms: float = 0.0, tpot_ms: float = 0.0
) -> ServiceLevel:
    """Return bounds that a system keeps unless queues grow, or those given (above 0).

    TPOT: twice SUN's step with a full batch. TTFT: ten such TPOTs and four prefills of a long prompt (95th percentile).

    Args:
        requests: those to simulate, or a sample of them; only their lengths count.
    """
    tpot = 2 * _full_step(requests, curves, max_batch)[1]
    prompt = percentile([request.prompt_tokens for request in requests], 0.95)
    easy = 10 * tpot + 4 * curves.prefill(int(prompt))
    return ServiceLevel(ttft_ms or 1000 * easy, tpot_ms or 1000 * tpot)


def _full_step(requests: Sequence[TracedRequest], curves: Curves, max_batch: int) -> tuple[float, float]:
    """Return mean output tokens, and seconds of SUN's step with a full batch of half-finished requests."""
    outputs = statistics.fmean(request.output_tokens for request in requests)
    context = statistics.fmean(request.prompt_tokens for request in requests) + outputs / 2
    return outputs, curves.step(SUN, max_batch, context)


@dataclass(frozen=True)
class Capacity:
    """The highest rate that a system serves well, and the simulation at that rate."""

    rate: float
    result: SimulationResult

    def tokens_per_s(self) -> float:
        """Return the throughput of a decode worker."""
        return self.result.steady_tokens_per_s() / len(self.result.system.decode)


def mean_tpot_ms(result: SimulationResult) -> float:
    """Return the mean over requests; 0 if all have a single token."""
    tpots = result.tpots_ms()
    return math.fsum(tpots) / len(tpots) if tpots else 0.0


def find_capacity(scenario: Scenario, kind: str, workers: int, tpot_ms: float = math.inf) -> Capacity | None:
    """Return `highest_rate`; None also if the workers cannot hold their modules or a request at any rate."""
    try:
        return highest_rate(scenario, kind, workers, tpot_ms)
    except DoesNotFit:  # a lower rate has a shorter trace, which may lack the one request that is too long
        return None


def highest_rate(scenario: Scenario, kind: str, workers: int, tpot_ms: float = math.inf) -> Capacity | None:
    """Search the highest rate, to 2%, that the scenario serves; None if even a lone request is too slow.

    Args:
        tpot_ms: upper bound on the mean TPOT as well.
    Raises:
        DoesNotFit: the workers cannot hold their modules, or a request.
    """
    first = rate = workers * scenario.deployment.max_batch / scenario.life() / 2
    best: Capacity | None = None
    while best is None:
        best = _serving(scenario, kind, workers, rate, tpot_ms)
        if best is None:
            rate /= 2
            if rate < 1e-6 * first:
                return None
    while (more := _serving(scenario, kind, workers, 2 * best.rate, tpot_ms)) is not None:
        best = more
    low, high = best.rate, 2 * best.rate
    while high / low > _TOLERANCE:
        middle = math.sqrt(low * high)
        found = _serving(scenario, kind, workers, middle, tpot_ms)
        low, high = (middle, high) if found else (low, middle)
        best = found or best
    return best


def _serving(scenario: Scenario, kind: str, workers: int, rate: float, tpot_ms: float) -> Capacity | None:
    result = scenario.run(kind, workers, rate)
    return Capacity(rate, result) if scenario.serves(result, tpot_ms) else None


def workers_needed(scenario: Scenario, kind: str, rate: float) -> int | None:
    """Search the fewest decode workers that serve a rate, by doubling and bisection; None if 4096 do not."""

    def enough(workers: int) -> bool:
        try:
            return scenario.serves(scenario.run(kind, workers, rate))
        except DoesNotFit:  # few workers hold many models each; more workers may fit
            return False

    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_WORKERS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
