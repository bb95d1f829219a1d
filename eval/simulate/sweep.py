"""`qsun simulate`: every system at given rates, on a given trace, or at its capacity, by skew."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from qsun.errors import QsunError
from qsun.eval.load.workload import TracedRequest
from qsun.eval.simulate.capacity import Capacity, Scenario, find_capacity, highest_rate, mean_tpot_ms, workers_needed
from qsun.eval.simulate.compared_systems import CONVENTIONAL, KINDS
from qsun.eval.simulate.curves import SUN, DoesNotFit
from qsun.progress import Progress

SAME_TPOT = 1.05  # "with TPOT within 5%"
_NEEDED_SHARE = 0.9  # of a capacity: at the very edge, one worker more or less would be chance


def simulation_result(
    scenario: Scenario,
    workers: int,
    skews: Sequence[float],
    rates: Sequence[float],
    need: float | None,
    trace: Sequence[TracedRequest] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Return the content of simulate.json.

    Args:
        rates: empty: search each system's capacity, and the fewest workers that serve `need` (see `over_skew`).
        trace: replaces skews and rates.
    """
    level, deployment, workload = scenario.level, scenario.deployment, scenario.workload
    if trace is not None:
        rows = _on_trace(scenario, workers, trace)
    elif rates:
        rows = _at_rates(scenario, workers, skews, rates, progress)
    else:
        rows = over_skew(scenario, workers, skews, need, progress)
    models = f"{len(workload.models)} model{'s' * (len(workload.models) > 1)}"
    return {
        "setting": f"{models}, {workers} decode workers, {deployment.assignment} assignment, batch up to "
        f"{deployment.max_batch}; SLO for {scenario.target:.0%}: "
        f"TTFT {level.ttft_ms:.4g} ms, TPOT {level.tpot_ms:.4g} ms",
        "curves": scenario.curves.source,
        "slo": level.described(),
        "workload": asdict(workload) if trace is None else {"models": workload.models, "requests": len(trace)},
        "deployment": asdict(deployment),
        "target": scenario.target,
        "rows": rows,
    }


def by_count(trace: Sequence[TracedRequest]) -> tuple[str, ...]:
    """Return the models of a trace, the busiest first."""
    return tuple(model for model, _ in Counter(request.model for request in trace).most_common())


def _on_trace(scenario: Scenario, workers: int, trace: Sequence[TracedRequest]) -> list[dict[str, Any]]:
    found = {kind: scenario.replay(kind, workers, trace) for kind in KINDS}
    return [{"skew": None, "rate": None} | result.summary(scenario.level) for result in found.values()]


def _at_rates(
    scenario: Scenario, workers: int, skews: Sequence[float], rates: Sequence[float], progress: Progress
) -> list[dict[str, Any]]:
    points = [(skew, rate, kind) for skew in skews for rate in rates for kind in KINDS]
    rows: list[dict[str, Any]] = []
    for skew, rate, kind in points:
        progress(f"skew {skew:g}, {rate:g} requests/s, {kind}", len(rows), len(points))
        found = scenario.at_skew(skew).run(kind, workers, rate)
        rows.append({"skew": skew, "rate": rate} | found.summary(scenario.level))
    progress("done", len(points), len(points))
    return rows


def over_skew(
    scenario: Scenario, workers: int, skews: Sequence[float], rate: float | None, progress: Progress
) -> list[dict[str, Any]]:
    """Find the capacity of every system at every skew, and the decode workers that each needs for one rate.

    Args:
        rate: rate to find the fewest workers for; None: 90% of SUN's capacity at the first skew, or of another
            system's if SUN meets the SLO at no rate.
    Returns:
        A row for each skew and system: `SimulationResult.summary` at its capacity, with "rate", "skew", "ratio"
        (tokens/s of a decode worker over the conventional system's), "ratio_same_tpot" (the same where the mean TPOT is
        within 5% of the conventional system's at its own capacity; None if no rate gives that), "workers_needed" (None:
        no number of workers serves that rate), "needed_rate" and "misfit" (why these workers serve nothing at all, or
        None).
    Raises:
        QsunError: no system serves any rate; DoesNotFit if SUN's workers cannot hold a module or a request.
    """
    rows: list[dict[str, Any]] = []
    total, done = 2 * len(skews) * len(KINDS), 0
    for skew in skews:
        here = scenario.at_skew(skew)
        found: dict[str, Capacity | DoesNotFit | None] = {}
        for kind in KINDS:
            progress(f"skew {skew:g}, {kind}: capacity", done, total)
            found[kind] = _capacity(here, kind, workers)
            done += 1
        if rate is None:
            rate = _reference_rate(found)
        for kind, capacity in found.items():
            progress(f"skew {skew:g}, {kind}: workers needed", done, total)
            # where even a lone request is too slow, more workers do not help
            needed = None if capacity is None else workers_needed(here, kind, rate)
            rows.append(_row(here, kind, skew, _served(capacity), _served(found[CONVENTIONAL])))
            misfit = str(capacity) if isinstance(capacity, DoesNotFit) else None
            rows[-1] |= {"workers_needed": needed, "needed_rate": rate, "misfit": misfit}
            done += 1
        if not any(row["rate"] or row["workers_needed"] for row in rows):
            _refuse(found)
    progress("done", total, total)
    return rows


def _capacity(scenario: Scenario, kind: str, workers: int) -> Capacity | DoesNotFit | None:
    """Return `highest_rate`, or why these workers serve nothing; None if even a lone request is too slow."""
    try:
        return highest_rate(scenario, kind, workers)
    except DoesNotFit as misfit:
        return misfit


def _served(capacity: Capacity | DoesNotFit | None) -> Capacity | None:
    return capacity if isinstance(capacity, Capacity) else None


def _reference_rate(found: Mapping[str, Capacity | DoesNotFit | None]) -> float:
    """Return 90% of SUN's capacity, or of the first system's that has one."""
    for capacity in (found[SUN], *found.values()):
        if isinstance(capacity, Capacity):
            return _NEEDED_SHARE * capacity.rate
    return _refuse(found)


def _refuse(found: Mapping[str, Capacity | DoesNotFit | None]) -> NoReturn:
    """Say why no system serves any rate."""
    if isinstance(misfit := found[SUN], DoesNotFit):
        raise misfit
    raise QsunError("no system meets the SLO at any rate; relax --slo-ttft or --slo-tpot")


def _row(
    scenario: Scenario, kind: str, skew: float, found: Capacity | None, reference: Capacity | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"skew": skew, "system": kind, "rate": found.rate if found else 0.0}
    if found is not None:
        row |= found.result.summary(scenario.level)
    row["ratio"] = row["ratio_same_tpot"] = None
    if found is not None and reference is not None:
        row["ratio"] = found.tokens_per_s() / reference.tokens_per_s()
        limit = SAME_TPOT * mean_tpot_ms(reference.result)
        held: Capacity | None = found
        if mean_tpot_ms(found.result) > limit:
            held = find_capacity(scenario, kind, len(found.result.system.decode), limit)
        row["ratio_same_tpot"] = held and held.tokens_per_s() / reference.tokens_per_s()
    return row


def where_ratio(rows: Sequence[Mapping[str, Any]], kind: str, wanted: float) -> float | None:
    """Return the smallest skew, interpolated, at which "ratio_same_tpot" reaches `wanted`; None if it never does.

    If the previous skew has no ratio to interpolate from, it is the simulated skew itself.
    """
    before: tuple[float, float] | None = None
    for skew, ratio in ((row["skew"], row["ratio_same_tpot"]) for row in rows if row["system"] == kind):
        if ratio is None:
            before = None
            continue
        if ratio >= wanted:
            least, lower = before or (skew, 0.0)
            return least + (skew - least) * (wanted - lower) / (ratio - lower)
        before = (skew, ratio)
    return None
