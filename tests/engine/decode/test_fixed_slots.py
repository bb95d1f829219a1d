"""Slots in memory that does not move, against the same brute-force model, and who holds that memory when."""

import gc
import random
from types import SimpleNamespace

import pytest
import torch

from qsun.engine.decode.buckets import column_buckets, columns_bucket, row_buckets, rows_bucket, seen_columns, widened
from qsun.engine.decode.fixed_slots import FixedSlots, budget_for
from qsun.engine.decode.slot_memory import free_tokens
from tests.engine.decode.test_slot_cache import CONFIG, walk


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
        self.config = CONFIG
        self.weight = torch.nn.Parameter(torch.zeros(2))


def test_buckets():
    assert column_buckets(2000) == [256, 384, 512, 768, 1024, 1280, 1536, 1792, 2000]
    assert column_buckets(256) == [256]
    assert column_buckets(100) == [100]
    assert [columns_bucket(n, 2000) for n in (1, 256, 257, 1500, 1793, 2000, 3000)] == [
        *(256, 256, 384, 1536, 2000, 2000, 2000)
    ]
    assert [row_buckets(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
    assert [rows_bucket(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert seen_columns(2000, own_only=True, coarse=False) == [2000]
    assert seen_columns(2000, own_only=False, coarse=True) == [256, 1024, 2000]
    assert seen_columns(2000, own_only=False, coarse=False) == column_buckets(2000)
    assert all(a < b for a, b in zip(column_buckets(131072), column_buckets(131072)[1:], strict=False))
    assert widened([256, 384, 600], 1500) == [288, 368, 496, 600]
    assert widened([100], 100) == [100]


@pytest.mark.parametrize(("budget", "most"), [(100_000, 100_000), (12_345, 12_345), (1_000_000, 131_072)])
def test_rounded_columns_cost_a_fifth_of_the_rows_at_most(budget, most):
    sizes = widened(column_buckets(most), budget)
    assert sizes == sorted(set(sizes))
    for need in [*range(1024, most, 3), most]:
        rows, exact = budget // next(size for size in sizes if size >= need), budget // min(need + 15, most)
        assert rows >= exact if exact <= 8 else rows >= 0.8 * exact, need


@pytest.mark.parametrize("seed", range(8))
def test_rows_keep_their_own_columns_and_addresses_stay(seed):
    rng, model = random.Random(seed), Model()
    cache = FixedSlots(model, 4000)
    addresses = {keys.untyped_storage().data_ptr() for keys, _ in cache.buffers}
    shapes = set()

    def draw_need():
        return rng.randrange(1, rng.choice([100, 900, 4001]))

    for needs in walk(cache, rng, 200, draw_need):
        rows, columns = cache.capacity
        shapes.add(columns)
        assert rows * columns <= 4000
        assert columns in cache.column_sizes
        assert rows >= len(needs)
        assert max(needs, default=0) <= columns
    assert len(shapes) > 2
    assert {keys.untyped_storage().data_ptr() for keys, _ in cache.buffers} == addresses


def test_two_requests_of_half_the_budget_fit():
    cache = FixedSlots(Model(), 100_000)
    assert cache.fits([50_000, 50_000])
    cache.place([], 0, 50_000)
    cache.place([], 0, 50_000)
    assert cache.capacity == (2, 50_000)


def test_one_request_of_the_whole_budget_fits():
    cache = FixedSlots(Model(), 700)
    assert cache.fits([700])
    cache.place([], 0, 700)
    assert cache.capacity == (1, 700)
    assert not cache.fits([1])


def test_the_next_batch_takes_over_memory_and_finds_zeros():
    model = Model()
    first = FixedSlots(model, 1024)
    first.place([(torch.full((2, 3, 8), torch.nan),) * 2] * 3, 3, 10)
    memory = first.memory
    beside = FixedSlots(model, 512)
    assert beside.memory is not memory
    assert free_tokens(model) == 0
    del first
    gc.collect()
    assert free_tokens(model) == 1024
    second = FixedSlots(model, 600)
    assert second.memory is memory
    assert all(bool((tensor == 0).all()) for layer in memory.layers for tensor in layer)
    assert second.lengths.tolist() == [0] * 4
    assert second.budget_tokens == 600
    del beside, second
    larger = FixedSlots(model, 2048)  # the smaller ones are gone
    assert larger.memory is not memory
    assert free_tokens(model) == 0
    assert free_tokens(Model()) == 0


def test_weights_that_moved_end_what_graphs_hold():
    model = Model()
    memory = FixedSlots(model, 512).memory
    assert FixedSlots(model, 512).memory is memory
    model.weight = torch.nn.Parameter(torch.ones(2))
    assert FixedSlots(model, 512).memory is not memory


def test_budgets():
    model = Model()
    assert budget_for(model, 3, 300, static=True) == 4 * 300  # no known positions: all that a row needs
    model.config = SimpleNamespace(**vars(CONFIG), max_position_embeddings=4096)
    assert budget_for(model, 3, 300, static=True) == 4 * 384
    assert budget_for(model, 3, 300) == 900
    cache = FixedSlots(model, budget_for(model, 3, 300, static=True))
    assert cache.fits([300, 300, 300, 300])
