"""Percentiles and means of measured times."""

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that a `share` of all values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean, p50, p90 and p99; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    points = {f"p{round(100 * share)}": percentile(ordered, share) for share in (0.5, 0.9, 0.99)}
    return {"mean": statistics.fmean(ordered)} | points
