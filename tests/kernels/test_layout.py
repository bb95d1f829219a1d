"""The packed layout: every nibble where the description says, padding that adds nothing, and back again."""

import pytest
import torch

from qsun.kernels.layout import interleave_gate_up, pack_int4, tile_group, unpack_int4

SHAPES = [(16, 32, 32), (80, 416, 32), (64, 128, 128), (176, 320, 64), (48, 224, -1), (64, 512, 256), (16, 64, 64)]


def draw(N, K, group_size, top=15):
    groups = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, top + 1, (N, K), dtype=torch.uint8)
    return q, torch.rand(groups, N).half(), torch.randint(0, top + 1, (groups, N))


@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_every_nibble_is_where_the_layout_says(N, K, group_size):
    q, scales, zeros = draw(N, K, group_size)
    words = pack_int4(q, scales, zeros, group_size, torch.float16).words
    assert words.shape == (-(-N // 64), -(-K // 128), 64, 32)
    assert words.dtype == torch.int16
    words = words.tolist()
    for n in range(N):
        for k in range(K):
            word = words[n // 64][k // 128][n % 64][k % 32] & 0xFFFF
            assert (word >> (4 * (k % 128 // 32))) & 15 == q[n, k], (n, k)


@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_scales_and_zeros_lie_by_groups_of_a_tile(N, K, group_size):
    q, scales, zeros = draw(N, K, group_size)
    packed = pack_int4(q, scales, zeros, group_size, torch.float16)
    group = tile_group(group_size, K)
    rows = -(-K // 128) * 128 // group if group else 1
    assert packed.scales.shape == packed.zeros.shape == (rows, -(-N // 64) * 64)
    wanted = torch.zeros(rows, packed.scales.shape[1])
    zero = wanted.clone()
    for row in range(min(rows, K // group) if group else 1):
        source = row * group // (K if group_size == -1 else group_size)
        wanted[row, :N], zero[row, :N] = scales[source], zeros[source]
    assert torch.equal(packed.scales.float(), wanted)
    assert torch.equal(packed.zeros.float(), zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_unpacking_gives_it_back(N, K, group_size, dtype):
    q, scales, zeros = draw(N, K, group_size)
    back = unpack_int4(pack_int4(q, scales, zeros, group_size, dtype), N, K, group_size)
    for ours, theirs in zip(back, (q, scales.to(dtype), zeros.to(torch.uint8)), strict=True):
        assert torch.equal(ours, theirs)


def test_blocks_of_rows_join(monkeypatch):
    q, scales, zeros = draw(320, 256, 32)
    whole = pack_int4(q, scales, zeros, 32)
    monkeypatch.setattr("qsun.kernels.layout._BLOCK_ELEMENTS", 2 * 64 * 256)
    assert torch.equal(pack_int4(q, scales, zeros, 32).words, whole.words)


@pytest.mark.parametrize(
    ("bits", "zero", "symmetric"), [(4, 8, True), (3, 4, True), (2, 2, True), (4, 7, False), (4, 9, False)]
)
def test_equal_zero_points_move_to_8_where_there_is_room(bits, zero, symmetric):
    q, scales, _ = draw(64, 128, 32, top=2**bits - 1)
    q[0, 0] = 2**bits - 1
    packed = pack_int4(q, scales, torch.full((4, 64), zero), 32)
    assert (packed.zeros is None) == symmetric
    back, _, zeros = unpack_int4(packed, 64, 128, 32)
    assert torch.equal(back.int() - zeros.int().t().repeat_interleave(32, 1), q.int() - zero)


def test_gate_and_up_lie_in_blocks_of_8():
    gate, up = torch.arange(24)[:, None], torch.arange(100, 124)[:, None]
    rows = interleave_gate_up(gate, up)[:, 0].tolist()
    assert rows == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116), *range(16, 24), *range(116, 124)]


@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(16, 48, -1), (16, 96, 64), (16, 96, 48), (16, 256, 96), (16, 256, 0)]
)
def test_groups_that_do_not_fit(N, K, group_size):
    with pytest.raises(ValueError, match="use"):
        pack_int4(torch.zeros(N, K, dtype=torch.uint8), torch.ones(1, N), torch.zeros(1, N), group_size)


def test_shapes_that_do_not_fit():
    q, scales, zeros = draw(16, 64, 32)
    for bad in ((q.int(), scales, zeros), (q, scales[:1], zeros), (q, scales, zeros.t())):
        with pytest.raises(ValueError, match="want"):
            pack_int4(*bad, 32)
    for bad in ((q, q[:8]), (q[:7], q[:7])):
        with pytest.raises(ValueError, match="multiple of 8"):
            interleave_gate_up(*bad)
