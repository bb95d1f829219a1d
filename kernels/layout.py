"""The one packed layout of 4-bit weights that every GPU kernel reads.

Weights are cut into tiles of 64 rows and 128 columns: 4 KiB, contiguous, and contiguous along K for the same 64 rows.
Word (nb, kt, r, j) holds four weights of row ``n = 64 nb + r``; its nibble i (the lowest first) is column
``k = 128 kt + 32 i + j``. So a nibble plane is 32 adjacent columns: one group of 32, half a group of 64, a quarter of a
group of 128, and the same words serve all of them.

Rows are padded to 64 and columns to 128. Padding has no effect: padded scales are zero, a kernel reads zeros for the
columns of x past K, and it does not write rows past N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS, COLUMNS, PLANE = 64, 128, 32  # of a tile, and the columns that one nibble of its words covers
INTERLEAVED_ROWS = 8  # of gate, then of up, in a merged projection
MIDDLE = 8  # the zero point of a symmetric grid
_BLOCK_ELEMENTS = 1 << 22  # weights that are packed at once


class PackedInt4(NamedTuple):
    """A packed weight matrix.

    words: (ceil(N / 64), ceil(K / 128), 64, 32) int16.
    scales: (G', 64 ceil(N / 64)) fp16 or bf16, the dtype of the activations; G' = 128-column tiles times groups a tile,
        or 1 where one group spans the row.
    zeros: like scales, whole numbers 0..15; None where every zero point is 8.
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


def pack_int4(
    q: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> PackedInt4:
    """Pack a quantized matrix on its own device.

    Needs at most 64 MiB besides the result, whatever the matrix's size.

    Args:
        q: (N, K) uint8, values 0..15; 2- and 3-bit weights take a nibble each too.
        scales: (G, N) floating; rounded to dtype.
        zeros: (G, N) integers 0..15. Where all are equal and q has room, both are shifted so that they become 8:
            symmetric 2- and 3-bit modules then use the cheaper symmetric kernel.
        group_size: columns a group, -1 for one group.
        dtype: of the activations, float16 or bfloat16.
    Raises:
        ValueError: incompatible shapes or dtypes.
    """
    N, K = q.shape
    group = tile_group(group_size, K)
    G = 1 if group_size == -1 else K // group_size
    if q.dtype != torch.uint8 or tuple(scales.shape) != (G, N) or tuple(zeros.shape) != (G, N):
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)} do not fit "
            f"group_size {group_size}; want uint8 (N, K) and twice ({G}, {N})"
        )
    shift = _symmetric_shift(q, zeros)
    words = _pack_words(q, shift or 0)
    repeat = group_size // COLUMNS if group == COLUMNS else 1
    kept = None if shift is not None else _pad_groups(zeros, group, repeat, K, dtype)
    return PackedInt4(words, _pad_groups(scales, group, repeat, K, dtype), kept)


def unpack_int4(packed: PackedInt4, N: int, K: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `pack_int4`: q (N, K) uint8, scales (G, N) in their dtype, zeros (G, N) uint8.

    Where packing shifted equal zero points to 8, q and zeros stay shifted; ``q - zeros`` is the same.
    """
    group = tile_group(group_size, K)
    planes = torch.stack([(packed.words >> (4 * i)) & 15 for i in range(4)], dim=3).to(torch.uint8)
    q = planes.permute(0, 2, 1, 3, 4).reshape(packed.words.shape[0] * ROWS, -1)[:N, :K]
    step = group_size // COLUMNS if group == COLUMNS else 1
    G = 1 if group == 0 else K // group
    scales = packed.scales[:G:step, :N]
    zeros = torch.full_like(scales, MIDDLE) if packed.zeros is None else packed.zeros[:G:step, :N]
    return q.contiguous(), scales.contiguous(), zeros.to(torch.uint8)


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


def _symmetric_shift(q: Tensor, zeros: Tensor) -> int | None:
    """Return what to add to q and zeros so that every zero point is 8; None where that is impossible."""
    low, high = zeros.aminmax()
    if low != high or int(low) > MIDDLE:
        return None
    shift = MIDDLE - int(low)
    return shift if shift == 0 or int(q.max()) + shift <= 15 else None


def _pack_words(q: Tensor, shift: int) -> Tensor:
    N, K = q.shape
    blocks, tiles = ceil_div(N, ROWS), ceil_div(K, COLUMNS)
    words = torch.empty(blocks, tiles, ROWS, PLANE, dtype=torch.int16, device=q.device)
    step = max(1, _BLOCK_ELEMENTS // (ROWS * tiles * COLUMNS))
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        rows = q[first * ROWS : (first + count) * ROWS].to(torch.int16) + shift
        rows = torch.nn.functional.pad(rows, (0, tiles * COLUMNS - K, 0, count * ROWS - rows.shape[0]))
        planes = rows.view(count, ROWS, tiles, 4, PLANE).permute(0, 2, 1, 3, 4)
        low = planes[..., 0, :] | (planes[..., 1, :] << 4)
        words[first : first + count] = low | (planes[..., 2, :] << 8) | (planes[..., 3, :] << 12)
    return words


def _pad_groups(values: Tensor, group: int, repeat: int, K: int, dtype: torch.dtype) -> Tensor:
    """Pad (G, N) to (G', padded N) with zeros, in dtype."""
    rows = values.repeat_interleave(repeat, 0) if repeat > 1 else values
    wanted = ceil_div(K, COLUMNS) * (COLUMNS // group) if group else 1
    out = torch.zeros(wanted, padded_rows(values.shape[1]), dtype=dtype, device=values.device)
    out[: rows.shape[0], : values.shape[1]] = rows.to(dtype)
    return out
