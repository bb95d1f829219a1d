"""Draws follow the distribution that transformers' own logits processors leave."""

import math
from itertools import product

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qsun.runtime.tokens import sampling
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


def brute_force(row, number, temperature, top_p, top_k, min_p):
    """The token of one row, by sums over all of its tokens."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    weights = [math.exp((row[token] - row[order[0]]) / temperature) for token in order]
    weights = weights[: int(top_k) or None]
    most, mass, kept = top_p * math.fsum(weights), 0.0, []
    for weight in weights:
        if mass >= most and top_p < 1:
            break
        kept.append(weight)
        mass += weight
    kept = [weight for weight in kept if weight >= min_p]
    below, total = 0.0, math.fsum(kept)
    for token, weight in zip(order, kept, strict=False):
        below += weight
        if below > number * total:
            return token
    return order[len(kept) - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 4.0])
def test_large_vocabularies_draw_what_sums_over_all_their_tokens_give(dtype, spread):
    chosen = [(0.3, 1.0, 2.0), (1.0, 0.95, 0.5, 1e-9), (0, 1, 40, 511, 512, 700, 9000), (0.0, 0.05, 1e-6, 1.0)]
    settings = [torch.tensor(values, dtype=torch.float64) for values in zip(*product(*chosen), strict=True)]
    vocabulary, count = 1537, len(settings[0])
    torch.manual_seed(int(spread))
    logits = (spread * torch.randn(count, vocabulary)).to(dtype)  # bfloat16: many are equal
    logits[1::5, torch.randperm(vocabulary)[:1100]] = float("-inf")  # as a grammar leaves them
    settings = [torch.rand(count, dtype=torch.float64), *settings]
    listed = (values.tolist() for values in settings)
    expected = [brute_force(row, *own) for row, *own in zip(logits.tolist(), *listed, strict=True)]
    assert draw(logits, *settings).tolist() == expected
    tokens, found = sampling._draw_of_head(logits, torch.stack(settings, 1))  # as on a GPU
    assert [t for t, ok in zip(tokens.tolist(), found, strict=True) if ok] == [
        t for t, ok in zip(expected, found, strict=True) if ok
    ]


def test_usual_draws_sort_no_vocabulary(monkeypatch):
    torch.manual_seed(0)
    logits = 6 * torch.randn(64, 5000)
    monkeypatch.setattr(sampling, "_draw_of_all", None)
    numbers = torch.linspace(0, 0.99, 64, dtype=torch.float64)
    for settings in ((1.0,), (0.7, 0.95), (1.0, 1.0, 40), (1.0, 0.9, 50, 0.05), (1.0, 1.0, 0, 0.05)):
        draw(logits, numbers, *settings)


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[0.0, 5.0, -1000.0]]).expand(2, -1)
    tokens = draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0, 0)
    assert tokens.tolist() == [1, 0]


def test_rows_of_one_call_draw_numbers_of_their_own():
    drawn = {float(torch.rand(1, generator=torch.Generator().manual_seed(row_seed(5, n)))) for n in range(64)}
    assert len(drawn) == 64  # a CPU's generator reads the low 32 bits of a seed only
    assert row_seed(5, 0) == 5
