"""Two variants on the same examples: the difference of their rates with an interval, and McNemar's test.

Paired statistics are what a comparison on one test set needs: whether B is worse than A is decided by the examples on
which they differ, not by the spread of the examples' difficulty.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Paired:
    """B minus A.

    Attributes:
        difference: of the rates. low, high: 95% interval by the paired bootstrap (percentiles).
        only_a, only_b: examples that only one of the two gets right.
        p_value: McNemar's exact test, two-sided: that such a split of the differing examples, or a more lopsided one,
            comes about by chance.
    """

    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(a: Sequence[bool], b: Sequence[bool], seed: int = 0, draws: int = 10_000) -> Paired:
    """Compare variant `b` with variant `a`, example by example.

    Raises:
        ValueError: no examples, or not as many in both.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} examples; both variants need the same ones, and at least one")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = len(a)
    # an example contributes -1, 0 or +1, so a resampled set is a multinomial draw of these three
    drawn = np.random.default_rng(seed).multinomial(n, [only_a / n, only_b / n, 1 - (only_a + only_b) / n], size=draws)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / n, [2.5, 97.5])
    return Paired((only_b - only_a) / n, float(low), float(high), only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value: twice the tail of a fair coin thrown only_a + only_b times, at most 1."""
    thrown, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(thrown, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**thrown)
