"""The prefix cache: the longest known beginning of the same module, within its budget."""

import torch

from qsun.engine.prefix_cache import BLOCK_TOKENS, PrefixCache

BLOCK_BYTES = 2 * 2 * BLOCK_TOKENS * 4 * 4  # K and V, heads, tokens, width, float32


def kv(tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, tokens, 4, generator=random), torch.randn(2, tokens, 4, generator=random))]


def test_whole_blocks_come_back_bit_by_bit():
    cache = PrefixCache(1 << 20)
    tokens, layers = list(range(100)), kv(100)
    assert cache.find(1, tokens) == (0, [])
    cache.keep(1, tokens, layers)
    found, known = cache.find(1, [*tokens[:70], 5, 6])
    assert found == 64
    assert torch.equal(known[0][0], layers[0][0][:, :64])
    assert torch.equal(known[0][1], layers[0][1][:, :64])
    assert cache.find(1, tokens[:31])[0] == 0
    assert cache.find(1, [9, *tokens[1:]])[0] == 0
    assert (cache.hits, cache.lookups) == (64, 100 + 72 + 31 + 100)


def test_another_module_finds_nothing_and_forgetting_drops_only_its_own():
    cache = PrefixCache(1 << 20)
    cache.keep(1, list(range(64)), kv(64, 1))
    cache.keep(2, list(range(64)), kv(64, 2))
    assert cache.find(3, list(range(64)))[0] == 0
    assert not torch.equal(cache.find(1, list(range(64)))[1][0][0], cache.find(2, list(range(64)))[1][0][0])
    cache.forget(1)
    assert cache.find(1, list(range(64)))[0] == 0
    assert cache.find(2, list(range(64)))[0] == 64
    cache.forget(2)
    assert cache.bytes == 0


def test_what_was_used_least_recently_goes_first_and_ends_before_beginnings():
    cache = PrefixCache(4 * BLOCK_BYTES)
    old, new = list(range(96)), list(range(200, 264))
    cache.keep(1, old, kv(96))
    cache.keep(1, new, kv(64))  # five blocks: the last of the old prompt goes
    assert cache.bytes == 4 * BLOCK_BYTES
    assert cache.find(1, old)[0] == 64
    cache.keep(1, list(range(300, 364)), kv(64))  # the old one was just used
    assert cache.find(1, old)[0] == 64
    assert cache.find(1, new)[0] == 0


def test_known_blocks_of_a_prompt_make_no_room_for_its_later_ones():
    cache = PrefixCache(4 * BLOCK_BYTES)
    cache.keep(1, list(range(64)), kv(128))
    cache.keep(1, list(range(200, 264)), kv(64))
    cache.keep(1, list(range(128)), kv(128))
    assert cache.find(1, list(range(128)))[0] == 128


def test_a_prompt_larger_than_the_budget_is_copied_no_further_than_that(monkeypatch):
    cache, copies = PrefixCache(3 * BLOCK_BYTES + 7), []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: copies.append(cache.bytes) or stack(parts))
    cache.keep(1, list(range(200, 264)), kv(64))
    cache.keep(1, list(range(320)), kv(320))
    assert copies == [0, BLOCK_BYTES, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES]
    assert cache.find(1, list(range(320)))[0] == 96


def test_kept_blocks_do_not_hold_the_prompts_buffers():
    cache = PrefixCache(1 << 20)
    layers = kv(64)
    cache.keep(1, list(range(64)), layers)
    for tensor in layers[0]:
        tensor.zero_()
    length, found = cache.find(1, list(range(64)))
    assert length == 64
    assert all(map(torch.equal, found[0], kv(64)[0]))


def test_a_block_takes_one_copy_for_all_layers(pretend_cuda):
    """And is freed alone: it is a part of no larger tensor."""
    cache, random = PrefixCache(1 << 20), torch.Generator().manual_seed(0)
    layers = [tuple(torch.randn(2, 3, 100, 4, generator=random).to("cuda")) for _ in range(5)]
    pretend_cuda.clear()
    cache.keep(1, list(range(100)), layers)
    assert sum(pretend_cuda.kernels.values()) == 3, pretend_cuda.kernels
    held = [block.inner.untyped_storage().nbytes() for block in cache._blocks.values()]
    assert held == [5 * 2 * 3 * BLOCK_TOKENS * 4 * 4] * 3
    assert cache.bytes == sum(held)
    pretend_cuda.clear()
    length, found = cache.find(1, list(range(100)))
    assert sum(pretend_cuda.kernels.values()) == 1, pretend_cuda.kernels
    for ours, theirs in zip(found, layers, strict=True):
        for part, whole in zip(ours, theirs, strict=True):
            assert torch.equal(part.cpu(), whole[:, :length].cpu())


def test_no_budget_keeps_nothing():
    cache = PrefixCache(0)
    cache.keep(1, list(range(64)), kv(64))
    assert cache.find(1, list(range(64)))[0] == 0
