"""4-bit matrix products on a CPU with bfloat16 activations: torch's own int4 op, its layout, and when it pays.

The op's layout is undocumented and depends on the instruction set. `unpack` finds it out by packing numbered rows.
"""

from functools import cache

import torch
from torch import Tensor

from qsun.kernels.avx512 import block_product as blocks

GROUP_SIZES = (32, 64, 128, 256)


def usable(N: int, K: int, group_size: int) -> bool:
    """Return whether this CPU's op is vectorized and supports the shape. group_size: -1 for one group a row."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and N % 16 == 0 and op_group_size(K, group_size) is not None


def op_group_size(K: int, group_size: int) -> int | None:
    """Return the group size to call the op with; for -1 the largest that divides K. None: the op supports none."""
    if group_size != -1:
        return group_size if group_size in GROUP_SIZES and K % group_size == 0 else None
    return next((size for size in reversed(GROUP_SIZES) if K % size == 0), None)


def int4_wins(M: int) -> bool:
    """Return whether an int4 product beats a bfloat16 product with a matrix that is kept dequantized.

    Measured with one thread and torch 2.13 for each instruction set (tables in docs/kernels.md). The crossover is a
    constant because it changes the last bits of results, which must not vary from run to run.
    """
    least, most = _wins_between()
    return least <= M <= most


@cache
def _wins_between() -> tuple[int, int]:
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return 2, 1 << 30  # one row is a bfloat16 GEMV there, which AVX2 does at the speed of memory
    if torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _blocks_usable()):
        return 1, 8
    return 1, 1 << 30


def blocks_win(M: int) -> bool:
    """Return whether dequantizing blocks in the cache beats the op."""
    return M > 4 and _blocks_usable()


def dequantizing_wins(M: int) -> bool:
    """Return whether dequantizing the whole matrix beats the op and the blocks, where no copy of it is kept."""
    return M >= 96 and not int4_wins(M)


def prepare() -> None:
    """Compile what products need, so that no request waits for it."""
    _blocks_usable()


@cache
def _blocks_usable() -> bool:
    if _block_rows() != blocks.BLOCK:
        return False
    low, high = _row_order(blocks.BLOCK)
    return low.tolist() == list(range(32)) and high.tolist() == list(range(32, 64)) and blocks.available()


def pack(q: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a matrix for the op.

    Args:
        q: (N, K) uint8, values 0..15.
        scales: (G, N) floating; rounded to bfloat16.
        zeros: (G, N) integers 0..15.
    Returns:
        words: uint8 in the op's layout; scale_zero: (G', N, 2) bfloat16, scale and (8 - zero) * scale, with one row for
        each group of `op_group_size`.
    """
    K, G = q.shape[1], scales.shape[0]
    size = op_group_size(K, -1 if G == 1 else K // G)
    assert size is not None  # `usable` says so
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    scales = scales.to(torch.bfloat16)
    pairs = torch.stack([scales, ((8 - zeros.float()) * scales.float()).to(torch.bfloat16)], -1)
    return words, pairs.repeat_interleave(K // size // G, 0).contiguous()


def unpack(words: Tensor, scale_zero: Tensor, K: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `pack`: q (N, K) uint8, scales (G, N) float32 (as rounded to bfloat16) and zeros (G, N) uint8."""
    N = scale_zero.shape[1]
    q = torch.empty(N, K, dtype=torch.uint8)
    block = _block_rows()
    whole = N // block * block
    for start, rows, count in ((0, block, N // block), (whole, N - whole, 1)):
        if rows == 0 or count == 0:
            continue
        low, high = _row_order(rows)
        part = words.view(-1)[start * K // 2 : (start + rows * count) * K // 2].view(count, K, rows // 2)
        target = q[start : start + rows * count].view(count, rows, K)
        target[:, low] = (part & 15).transpose(1, 2)
        target[:, high] = (part >> 4).transpose(1, 2)
    pairs = scale_zero[:: scale_zero.shape[0] // groups].float()
    scales = pairs[..., 0].contiguous()
    return q, scales, (8 - pairs[..., 1] / scales).round().to(torch.uint8)


def packed_product(x: Tensor, words: Tensor, scale_zero: Tensor) -> Tensor:
    """Return x (M, K) bfloat16 times the packed matrix: (M, N) bfloat16, accumulated in float32."""
    size = x.shape[1] // scale_zero.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, size, scale_zero)


def block_product(x: Tensor, words: Tensor, scale_zero: Tensor) -> Tensor:
    """Return what `packed_product` does, with weights rounded to bfloat16; for CPUs and batches of `blocks_win`."""
    y = blocks.multiply_block(x, words, scale_zero)
    N = words.shape[0]
    whole = N // blocks.BLOCK * blocks.BLOCK
    if whole < N:  # the op packs the last rows of such a matrix as a matrix of their own
        y[:, whole:] = packed_product(x, words[whole:], scale_zero[:, whole:].contiguous())
    return y


def _numbered(rows: int) -> tuple[Tensor, Tensor]:
    """Return the row numbers in the low and high nibble of every byte of a packed matrix of `rows` x 2."""
    digits = []
    for shift in (0, 4):
        digit = (torch.arange(rows) >> shift & 15).to(torch.int32)[:, None].expand(rows, 2).contiguous()
        digits.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit, 1).view(-1).long())
    low, high = ((digits[0] >> n & 15) + (digits[1] >> n & 15) * 16 for n in (0, 4))
    return low, high


@cache
def _row_order(rows: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the low and of the high nibbles in one block of [K, rows / 2] bytes."""
    low, high = _numbered(rows)
    return low[: rows // 2], high[: rows // 2]


@cache
def _block_rows() -> int:
    """Return how many rows the op packs together: the distance at which a row number repeats."""
    low, _ = _numbered(128)
    again = (low == low[0]).nonzero()[1]
    return 2 * int(again)
