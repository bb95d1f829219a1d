"""Two variants on the same examples: the difference of their rates with an interval, and McNemar's test.

A comparison on one test set needs paired statistics: only the examples on which the variants differ say whether B is
worse than A, not the spread of the examples' difficulty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Paired:
    """B minus A.

    Attributes:
        difference: of the rates. low, high: 95% interval by the paired bootstrap (percentiles).
        only_a, only_b: number of examples, over all tasks, that only A or only B gets right.
        p_value: of McNemar's exact two-sided test, the chance of a split of the differing examples at least as uneven.
    """

    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float


def compare(a: Sequence[bool], b: Sequence[bool], seed: int = 0) -> Paired:
    """Compare variant `b` with variant `a`, example by example.

    Raises:
        ValueError: no examples, or unequal numbers of them.
    """
    return compare_groups([(a, b)], seed)


def compare_groups(
    groups: Sequence[tuple[Sequence[bool], Sequence[bool]]], seed: int = 0, draws: int = 10_000
) -> Paired:
    """Compare over several tasks: the difference is the mean of theirs, and each is resampled by itself.

    For resampling, each task gets one more example that only A gets right and one that only B does (Bonett and Price,
    Statistics in Medicine 31, 2012); otherwise a few equal answers would give an interval of width 0.
    """
    generator = np.random.default_rng(seed)
    differences, drawn, counts = [], np.zeros(draws), np.zeros(2, dtype=int)
    for a, b in groups:
        if len(a) != len(b) or not a:
            raise ValueError(f"{len(a)} and {len(b)} examples; both variants need the same examples, and at least one")
        only = np.array([sum(x and not y for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (b, a))])
        n, more = len(a), only + 1
        # an example contributes -1, 0 or +1, so a resampled set is a multinomial draw of these three
        sets = generator.multinomial(n, [*more / (n + 2), 1 - more.sum() / (n + 2)], size=draws)
        drawn += (sets[:, 1] - sets[:, 0]) / n / len(groups)
        differences.append(float(only[1] - only[0]) / n)
        counts += only
    low, high = (float(value) for value in np.percentile(drawn, [2.5, 97.5]))
    only_a, only_b = int(counts[0]), int(counts[1])
    return Paired(sum(differences) / len(differences), low, high, only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value: twice the tail of a fair coin tossed only_a + only_b times, at most 1."""
    tosses, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(tosses, k) for k in range(fewer + 1)) / 2**tosses)
