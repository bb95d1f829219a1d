"""Paired statistics against brute force."""

import itertools
import random

import numpy as np
import pytest

from qsun.eval.report.paired import compare, compare_groups, mcnemar


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (3, 0), (2, 7), (5, 5), (8, 3)])
def test_mcnemar_counts_every_sequence_of_throws(only_a, only_b):
    thrown = only_a + only_b
    lopsided = abs(only_a - only_b)
    throws = list(itertools.product((-1, 1), repeat=thrown))
    assert mcnemar(only_a, only_b) == pytest.approx(sum(abs(sum(t)) >= lopsided for t in throws) / len(throws))


def test_the_interval_is_that_of_resampled_examples():
    rng = random.Random(5)
    a = [rng.random() < 0.8 for _ in range(400)]
    b = [x if rng.random() < 0.9 else not x for x in a]
    found = compare(a, b)
    difference = np.array(b, float) - np.array(a, float)
    draws = np.random.default_rng(9).integers(0, 400, (10_000, 400))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    assert found.difference == pytest.approx(difference.mean())
    assert abs(found.low - low) < 0.006 and abs(found.high - high) < 0.006
    assert found.low < found.difference < found.high
    assert (found.only_a, found.only_b) == ((difference < 0).sum(), (difference > 0).sum())


def test_the_difference_over_tasks_is_the_mean_of_theirs():
    large = [True] * 900 + [False] * 100, [True] * 920 + [False] * 80
    small = [True] * 40 + [False] * 10, [True] * 30 + [False] * 20
    found = compare_groups([large, small])
    assert found.difference == pytest.approx((0.02 - 0.2) / 2)
    assert found.low < found.difference < found.high < 0
    assert (found.only_a, found.only_b) == (10, 20)


def test_equal_variants_do_not_differ():
    same = compare([True, False], [True, False])
    assert (same.difference, same.p_value) == (0, 1)
    few, many = (compare([True] * n, [True] * n) for n in (8, 2000))
    assert few.low < -0.2 and few.high > 0.2, "eight equal answers prove little"
    assert -0.003 < many.low <= 0 <= many.high < 0.003
    with pytest.raises(ValueError, match="2 and 1 examples"):
        compare([True, False], [True])
    with pytest.raises(ValueError, match="at least one"):
        compare([], [])
