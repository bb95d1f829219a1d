"""The packed layout that every GPU kernel reads, for weights of 2, 3, 4 and 8 bits.

Weights are cut into tiles of 64 rows and `Tile.columns` columns, contiguous, and contiguous along K for the same 64
rows. A row of a tile has `Tile.words` 16-bit words. A plane is the field at one place of `Tile.lanes` adjacent words.
It holds as many adjacent columns: a group of 32, or half of one, so the same words serve every group size.

    bits    columns    words a row    planes
    2       256        32             8 of 32 columns: the fields of a word, the lowest first
    3       256        48             16 of 16 columns: 5 in each third of the words; the last has a bit of each third
    4       128        32             4 of 32 columns
    8       128        64             4 of 32 columns: 2 in each half of the words

No bit of a tile is wasted: K * bits / 8 bytes a row, with K padded to whole tiles, and rows to 64. Padding has no
effect: padded scales are zero, a kernel reads zeros for the columns of x past K, and it does not write rows past N.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # of a tile
COLUMNS, PLANE = 128, 32  # the largest group and the smallest that the kernels work with
INTERLEAVED_ROWS = 8  # of gate, then of up, in a merged projection
_BLOCK_ELEMENTS = 1 << 22  # weights that are packed at once


@dataclass(frozen=True)
class Tile:
    """The shape of a tile: its columns, the int16 words of a row, and the columns of a plane."""

    columns: int
    words: int
    lanes: int

    @property
    def planes(self) -> int:
        return self.columns // self.lanes


TILES = {2: Tile(256, 32, 32), 3: Tile(256, 48, 16), 4: Tile(128, 32, 32), 8: Tile(128, 64, 32)}


class PackedWeights(NamedTuple):
    """A packed weight matrix.

    words: (ceil(N / 64), ceil(K / columns), 64, words) int16; columns and words of TILES[bits].
    scales: (G', 64 ceil(N / 64)) fp16 or bf16, the dtype of the activations; G' = tiles times groups a tile, or 1 where
        one group spans the row.
    zeros: like scales, whole numbers; None where every zero point is 2^(bits - 1).
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None


def tile_group(group_size: int, in_features: int) -> int:
    """Return the group size that the kernels work with: 32, 64, 128, or 0 for one group a row.

    Multiples of 128 are 128 with repeated scales: 1.6% more bytes than one scale a row, and no kernel of its own.

    Raises:
        ValueError: a group size or in_features that the layout does not support.
    """
    if in_features % PLANE:
        raise ValueError(f"in_features {in_features} is not a multiple of {PLANE}; use a dense product")
    if group_size in (PLANE, 2 * PLANE, COLUMNS) and in_features % group_size == 0:
        return group_size
    if group_size in (-1, in_features):
        return 0
    if group_size > 0 and group_size % COLUMNS == 0 and in_features % group_size == 0:
        return COLUMNS
    raise ValueError(
        f"group_size {group_size} does not fit in_features {in_features}; use 32, 64, 128, a multiple of 128, or -1"
    )


def packable(out_features: int, in_features: int, group_size: int) -> bool:
    """Return whether the kernels support a shape and group size."""
    try:
        tile_group(group_size, in_features)
    except ValueError:
        return False
    return out_features % 16 == 0


def pack_weights(
    q: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype = torch.bfloat16, bits: int = 4
) -> PackedWeights:
    """Pack a quantized matrix on its own device.

    Needs at most 64 MiB besides the result, whatever the matrix's size.

    Args:
        q: (N, K) uint8, values below 2^bits.
        scales: (G, N) floating; rounded to dtype.
        zeros: (G, N) integers up to 2^bits. Where all are equal and q has room, both are shifted so that zeros become
            2^(bits - 1) and the cheaper symmetric kernel applies.
        group_size: columns a group, -1 for one group.
        dtype: of the activations, float16 or bfloat16.
        bits: 2, 3, 4 or 8.
    Raises:
        ValueError: incompatible shapes or dtypes.
    """
    N, K = q.shape
    group, columns = tile_group(group_size, K), TILES[bits].columns
    G = 1 if group_size == -1 else K // group_size
    if q.dtype != torch.uint8 or tuple(scales.shape) != (G, N) or tuple(zeros.shape) != (G, N):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)} do not fit "
            f"group_size {group_size}; want uint8 (N, K) and twice ({G}, {N})"
        )
    shift = _symmetric_shift(q, zeros, bits)
    words = _pack_words(q, shift or 0, bits)
    repeat = group_size // COLUMNS if group == COLUMNS else 1
    wanted = ceil_div(K, columns) * (columns // group) if group else 1
    kept = None if shift is not None else _pad_groups(zeros, repeat, wanted, dtype)
    return PackedWeights(words, _pad_groups(scales, repeat, wanted, dtype), kept)


def unpack_weights(
    packed: PackedWeights, N: int, K: int, group_size: int, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `pack_weights`: q (N, K) uint8, scales (G, N) in their dtype, zeros (G, N) uint8.

    Where packing shifted equal zero points, q and zeros stay shifted; ``q - zeros`` is the same.
    """
    group, tile = tile_group(group_size, K), TILES[bits]
    slabs = packed.words.view(*packed.words.shape[:3], -1, tile.lanes)
    planes = slabs.new_zeros(*packed.words.shape[:3], tile.planes, tile.lanes, dtype=torch.uint8)
    for plane, low, width, slab, place in _fields(bits):
        planes[..., plane, :] |= (((slabs[..., slab, :] >> place) & ((1 << width) - 1)) << low).to(torch.uint8)
    q = planes.permute(0, 2, 1, 3, 4).reshape(packed.words.shape[0] * ROWS, -1)[:N, :K]
    step = group_size // COLUMNS if group == COLUMNS else 1
    G = 1 if group == 0 else K // group
    scales = packed.scales[:G:step, :N]
    zeros = torch.full_like(scales, middle_of(bits)) if packed.zeros is None else packed.zeros[:G:step, :N]
    return q.contiguous(), scales.contiguous(), zeros.to(torch.uint8)


def middle_of(bits: int) -> int:
    """Return the zero point of a symmetric grid."""
    return 1 << (bits - 1)


def interleave_gate_up(gate_rows: Tensor, up_rows: Tensor) -> Tensor:
    """Arrange the rows of a merged gate and up projection for the SiLU * mul epilogue: 8 of gate, 8 of up, and so on.

    In a tensor core's accumulator rows r and r + 8 lie in one thread, so the product needs no exchange.

    Args:
        gate_rows, up_rows: (I, ...) of one shape, I a multiple of 8: q, or scales.t(), zeros.t(), or biases.
    Returns:
        (2 I, ...): row 16 b + r is gate's row 8 b + r for r < 8, up's row 8 b + r - 8 above.
    """
    if gate_rows.shape != up_rows.shape or gate_rows.shape[0] % INTERLEAVED_ROWS:
        raise ValueError(
            f"gate {tuple(gate_rows.shape)} and up {tuple(up_rows.shape)} need one shape, rows a multiple of 8"
        )
    rest = gate_rows.shape[1:]
    blocks = [rows.reshape(-1, INTERLEAVED_ROWS, *rest) for rows in (gate_rows, up_rows)]
    return torch.stack(blocks, dim=1).reshape(-1, *rest)


def separate_gate_up(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `interleave_gate_up`: gate's rows and up's."""
    blocks = rows.reshape(-1, 2, INTERLEAVED_ROWS, *rows.shape[1:])
    return blocks[:, 0].reshape(-1, *rows.shape[1:]), blocks[:, 1].reshape(-1, *rows.shape[1:])


def padded_rows(out_features: int) -> int:
    """Return the rows of scales and zeros: out_features rounded up to whole tiles."""
    return ceil_div(out_features, ROWS) * ROWS


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def _fields(bits: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the fields of a tile's words: (plane, lowest bit of q, bits, slab of words, lowest bit in the word)."""
    tile = TILES[bits]
    slabs = tile.words // tile.lanes
    whole = 16 // bits  # fields of a word
    for plane in range(slabs * whole):
        yield plane, 0, bits, plane // whole, bits * (plane % whole)
    for slab in range(slabs if 16 % bits else 0):
        yield tile.planes - 1, slab, 1, slab, 15


def _symmetric_shift(q: Tensor, zeros: Tensor, bits: int) -> int | None:
    """Return what to add to q and zeros so that every zero point is 2^(bits - 1); None where that is impossible."""
    low, high = zeros.aminmax()
    if low != high or int(low) > middle_of(bits):
        return None
    shift = middle_of(bits) - int(low)
    return shift if shift == 0 or int(q.max()) + shift < 1 << bits else None


def _pack_words(q: Tensor, shift: int, bits: int) -> Tensor:
    (N, K), tile = q.shape, TILES[bits]
    blocks, tiles = ceil_div(N, ROWS), ceil_div(K, tile.columns)
    words = torch.zeros(blocks, tiles, ROWS, tile.words, dtype=torch.int16, device=q.device)
    slabs = words.view(blocks, tiles, ROWS, -1, tile.lanes)
    step = max(1, _BLOCK_ELEMENTS // (ROWS * tiles * tile.columns))
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        rows = q[first * ROWS : (first + count) * ROWS].to(torch.int16) + shift
        rows = torch.nn.functional.pad(rows, (0, tiles * tile.columns - K, 0, count * ROWS - rows.shape[0]))
        planes = rows.view(count, ROWS, tiles, tile.planes, tile.lanes).transpose(1, 2)
        for plane, low, width, slab, place in _fields(bits):
            field = (planes[..., plane, :] >> low) & ((1 << width) - 1)
            slabs[first : first + count, ..., slab, :] |= field << place
    return words


def _pad_groups(values: Tensor, repeat: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Pad (G, N) to (groups, padded N) with zeros, in dtype."""
    rows = values.repeat_interleave(repeat, 0) if repeat > 1 else values
    out = torch.zeros(groups, padded_rows(values.shape[1]), dtype=dtype, device=values.device)
    out[: rows.shape[0], : values.shape[1]] = rows.to(dtype)
    return out
