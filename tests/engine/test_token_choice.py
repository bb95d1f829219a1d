"""Each row chooses by its own settings and random numbers, whatever shares its batch."""

import torch

from qsun.engine.config import Sampling
from qsun.engine.requests import Request
from qsun.engine.row import DecodeRow
from qsun.engine.token_choice import choose


def row(**sampling):
    return DecodeRow(Request("a", "m", (1,), Sampling(**sampling)))


def tokens_of(logits, rows):
    return [choice.token for choice in choose(logits, rows)]


def test_greedy_is_argmax():
    logits = torch.randn(5, 11)
    assert tokens_of(logits, [row() for _ in range(5)]) == logits.argmax(-1).tolist()


def test_rows_draw_from_their_own_numbers():
    logits = torch.zeros(3, 1000)
    rows = [row(temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    a, b = tokens_of(logits, rows), tokens_of(logits, rows)
    assert a[0] == a[2] and a[0] != a[1] and a[0] != b[0]
    again = row(temperature=1.0, seed=1)
    assert tokens_of(logits[:1], [again]) == a[:1]
    assert tokens_of(logits[:1], [again]) == b[:1]


def test_a_row_without_numbers_is_an_error_of_that_row_only():
    logits = torch.randn(4, 11)
    logits[1, 3] = float("nan")
    logits[2, 5] = float("inf")
    drawn = {"temperature": 0.7}
    for settings in ([{}] * 4, [drawn] * 4, [{}, drawn, drawn, {}]):
        choices = choose(logits, [row(**sampling) for sampling in settings])
        assert [bool(choice.error) for choice in choices] == [False, True, True, False]
        assert "NaN or Inf" in choices[1].error
