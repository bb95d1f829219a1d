"""Draws follow the distribution that transformers' own logits processors leave."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qsun.runtime.tokens.sampling import draw, row_seed


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.7, 0.8, 0, 0.0),
        (1.3, 1.0, 5, 0.0),
        (2.0, 0.6, 7, 0.0),
        (1.0, 1.0, 0, 0.2),
        (1.5, 0.9, 9, 0.3),
    ],
)
def test_the_share_of_each_token_is_its_probability(temperature, top_p, top_k, min_p):
    torch.manual_seed(top_k)
    logits = torch.randn(1, 23) * 2
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warp.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warp.append(TopPLogitsWarper(top_p))
    if min_p:
        warp.append(MinPLogitsWarper(min_p))
    expected = warp(None, logits.double()).softmax(-1)[0]
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every number once, so that shares are exact
    tokens = draw(logits.expand(20_000, -1), grid, temperature, top_p, top_k, min_p)
    shares = torch.bincount(tokens, minlength=23) / 20_000
    torch.testing.assert_close(shares.double(), expected, atol=2e-4, rtol=0)


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[0.0, 5.0, -1000.0]]).expand(2, -1)
    tokens = draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0, 0)
    assert tokens.tolist() == [1, 0]


def test_rows_of_one_call_draw_numbers_of_their_own():
    drawn = {float(torch.rand(1, generator=torch.Generator().manual_seed(row_seed(5, n)))) for n in range(64)}
    assert len(drawn) == 64  # a CPU's generator reads the low 32 bits of a seed only
    assert row_seed(5, 0) == 5
