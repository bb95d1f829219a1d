"""What counts as good service: upper bounds on TTFT and TPOT."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qsun.errors import QsunError


@dataclass(frozen=True)
class ServiceLevel:
    """A service level objective. ttft_ms, tpot_ms: upper bounds for a single request; infinite means no bound."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_ms), ("tpot", self.tpot_ms)):
            if not value > 0:
                raise QsunError(f"slo-{name} {value:g} is out of range; use milliseconds above 0")

    def met(self, ttft_ms: float, tpot_ms: float | None) -> bool:
        """Return whether a request is within the bounds; a request of one token has no TPOT and keeps that bound."""
        return ttft_ms <= self.ttft_ms and (tpot_ms is None or tpot_ms <= self.tpot_ms)

    def count(self, served: Iterable[tuple[float, float | None]]) -> int:
        """Return how many (ttft_ms, tpot_ms) are within the bounds."""
        return sum(self.met(ttft, tpot) for ttft, tpot in served)

    def described(self) -> dict[str, float | None]:
        return {
            name: value if math.isfinite(value) else None
            for name, value in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms))
        }
