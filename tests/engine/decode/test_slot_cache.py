"""The slots against a brute-force model: every row's own list of keys, through arrivals, steps and departures."""

import random
from types import SimpleNamespace

import pytest
import torch

from qsun.engine.decode.slot_cache import SlotCache
from qsun.model.architectures import kv_shape
from qsun.runtime.kv_cache import kv_bytes_per_token

CONFIG = SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=64)


def test_bytes_of_a_token():
    assert kv_shape(CONFIG) == (3, 2, 8)
    assert kv_bytes_per_token(CONFIG, torch.bfloat16) == 2 * 3 * 2 * 8 * 2
    plain = SimpleNamespace(num_hidden_layers=1, num_attention_heads=4, hidden_size=64)
    assert kv_shape(plain) == (1, 4, 16)


@pytest.mark.parametrize("seed", range(8))
def test_rows_keep_their_own_columns_and_the_budget_holds(seed):
    rng = random.Random(seed)
    cache = SlotCache(CONFIG, torch.zeros(1), budget_tokens=600)
    for _ in walk(cache, rng, 150, lambda: rng.randrange(1, 130)):
        rows, columns = cache.capacity
        assert rows * columns <= 600


def walk(cache, rng, turns, draw_need):
    """Let rows arrive, grow and leave at random. After each turn check the cache, and yield what its rows need."""
    expected, needs = [], []  # a row's keys by layer, (heads, filled, width)
    for _ in range(turns):
        need = draw_need()
        if rng.random() < 0.5 and cache.fits([need]):
            filled = rng.randrange(min(need, 130))
            layers = [(torch.randn(2, filled, 8), torch.randn(2, filled, 8)) for _ in range(3 if filled else 0)]
            assert cache.place(layers, filled, need) == len(expected)
            expected.append([keys for keys, _ in layers] or [torch.zeros(2, 0, 8)] * 3)
            needs.append(need)
        growing = [row for row, keys in enumerate(expected) if keys[0].shape[1] < needs[row]]
        if expected and len(growing) == len(expected):
            step(cache, expected)
        if expected and rng.random() < 0.45:
            row = rng.randrange(len(expected))
            cache.release(row)
            expected[row], needs[row] = expected[-1], needs[-1]
            expected.pop()
            needs.pop()
        check(cache, expected)
        yield needs


def step(cache, expected):
    rows = len(expected)
    cache.start((rows, max(keys[0].shape[1] for keys in expected) + 1))
    for layer in range(3):
        new = torch.randn(rows, 2, 1, 8)
        keys, values = cache.update(new, -new, layer)
        for row in range(rows):
            expected[row][layer] = torch.cat([expected[row][layer], new[row]], 1)
            seen = expected[row][layer].shape[1]
            assert torch.equal(keys[row, :, :seen], expected[row][layer])
            assert torch.equal(values[row, :, seen - 1 : seen], -new[row])
    cache.advance()


def check(cache, expected):
    assert cache.rows == len(expected)
    assert cache.lengths[: cache.rows].tolist() == cache.filled == [keys[0].shape[1] for keys in expected]
    for row, layers in enumerate(expected):
        for layer, keys in enumerate(layers):
            assert torch.equal(cache.buffers[layer][0][row, :, : keys.shape[1]], keys)


def test_a_long_row_takes_the_place_of_many_short_ones():
    cache = SlotCache(CONFIG, torch.zeros(1), budget_tokens=256)
    assert cache.fits([16] * 16)
    assert not cache.fits([16] * 17)
    assert cache.fits([256])
    cache.place([], 0, 200)
    assert not cache.fits([16])  # a rectangle: two rows of 200
