"""The packed layout: every weight where the description says, padding that adds nothing, and back again."""

import pytest
import torch

from qsun.kernels.layout import TILES, interleave_gate_up, pack_weights, packable, tile_group, unpack_weights

SHAPES = [(16, 32, 32), (80, 416, 32), (64, 128, 128), (176, 320, 64), (48, 224, -1), (64, 512, 256), (16, 64, 64)]


def draw(N, K, group_size, top=15):
    groups = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, top + 1, (N, K), dtype=torch.uint8)
    return q, torch.rand(groups, N).half(), torch.randint(0, top + 1, (groups, N))


def bits_of(n, k, bits):
    """Where the description puts the bits of a weight, the lowest first: (tile, word, bit) of each."""
    tile = TILES[bits]
    plane, lane = k % tile.columns // tile.lanes, k % tile.lanes
    if bits == 3 and plane == 15:
        return [(k // tile.columns, 16 * slab + lane, 15) for slab in range(3)]
    fields = 16 // bits
    return [
        (k // tile.columns, plane // fields * tile.lanes + lane, bits * (plane % fields) + bit) for bit in range(bits)
    ]


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_every_bit_is_where_the_layout_says(N, K, group_size, bits):
    q, scales, zeros = draw(N, K, group_size, top=2**bits - 1)
    words = pack_weights(q, scales, zeros, group_size, torch.float16, bits).words
    tile = TILES[bits]
    assert words.shape == (-(-N // 64), -(-K // tile.columns), 64, tile.words)
    assert words.dtype == torch.int16
    assert 16 * tile.words == bits * tile.columns  # no bit is wasted
    words = words.tolist()
    for n in range(0, N, 3):
        for k in range(K):
            row = [(words[n // 64][t][n % 64][word] >> bit) & 1 for t, word, bit in bits_of(n, k, bits)]
            assert sum(bit << i for i, bit in enumerate(row)) == q[n, k], (n, k)


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_scales_and_zeros_lie_by_groups_of_a_tile(N, K, group_size, bits):
    q, scales, zeros = draw(N, K, group_size, top=2**bits - 1)
    packed = pack_weights(q, scales, zeros, group_size, torch.float16, bits)
    group = tile_group(group_size, K)
    rows = -(-K // TILES[bits].columns) * TILES[bits].columns // group if group else 1
    assert packed.scales.shape == packed.zeros.shape == (rows, -(-N // 64) * 64)
    wanted = torch.zeros(rows, packed.scales.shape[1])
    zero = wanted.clone()
    for row in range(min(rows, K // group) if group else 1):
        source = row * group // (K if group_size == -1 else group_size)
        wanted[row, :N], zero[row, :N] = scales[source], zeros[source]
    assert torch.equal(packed.scales.float(), wanted)
    assert torch.equal(packed.zeros.float(), zero)


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_unpacking_gives_it_back(N, K, group_size, dtype, bits):
    q, scales, zeros = draw(N, K, group_size, top=2**bits - 1)
    back = unpack_weights(pack_weights(q, scales, zeros, group_size, dtype, bits), N, K, group_size, bits)
    for ours, theirs in zip(back, (q, scales.to(dtype), zeros.to(torch.uint8)), strict=True):
        assert torch.equal(ours, theirs)


def test_blocks_of_rows_join(monkeypatch):
    q, scales, zeros = draw(320, 256, 32)
    whole = [pack_weights(q & (2**bits - 1), scales, zeros, 32, bits=bits).words for bits in TILES]
    monkeypatch.setattr("qsun.kernels.layout._BLOCK_ELEMENTS", 2 * 64 * 256)
    blocks = [pack_weights(q & (2**bits - 1), scales, zeros, 32, bits=bits).words for bits in TILES]
    assert all(torch.equal(*pair) for pair in zip(whole, blocks, strict=True))


@pytest.mark.parametrize(
    ("bits", "zero", "top", "symmetric"),
    [
        *((4, 8, 15, True), (4, 2, 3, True), (4, 7, 15, False), (4, 9, 15, False)),
        *((3, 4, 7, True), (2, 2, 3, True), (2, 1, 3, False), (2, 1, 2, True)),
        *((8, 128, 255, True), (8, 127, 255, False)),
    ],
)
def test_equal_zero_points_move_to_the_middle_where_there_is_room(bits, zero, top, symmetric):
    q, scales, _ = draw(64, 128, 32, top=top)
    q[0, 0] = top
    packed = pack_weights(q, scales, torch.full((4, 64), zero), 32, bits=bits)
    assert (packed.zeros is None) == symmetric
    back, _, zeros = unpack_weights(packed, 64, 128, 32, bits)
    assert torch.equal(back.int() - zeros.int().t().repeat_interleave(32, 1), q.int() - zero)


def test_gate_and_up_lie_in_blocks_of_8():
    gate, up = torch.arange(24)[:, None], torch.arange(100, 124)[:, None]
    rows = interleave_gate_up(gate, up)[:, 0].tolist()
    assert rows == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116), *range(16, 24), *range(116, 124)]


@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(16, 48, -1), (16, 96, 64), (16, 96, 48), (16, 256, 96), (16, 256, 0)]
)
def test_groups_that_do_not_fit(N, K, group_size):
    assert not packable(N, K, group_size)
    with pytest.raises(ValueError, match="use"):
        pack_weights(torch.zeros(N, K, dtype=torch.uint8), torch.ones(1, N), torch.zeros(1, N), group_size)


def test_shapes_that_do_not_fit():
    q, scales, zeros = draw(16, 64, 32)
    for bad in ((q.int(), scales, zeros), (q, scales[:1], zeros), (q, scales, zeros.t())):
        with pytest.raises(ValueError, match="want"):
            pack_weights(*bad, 32)
    for bad in ((q, q[:8]), (q[:7], q[:7])):
        with pytest.raises(ValueError, match="multiple of 8"):
            interleave_gate_up(*bad)
