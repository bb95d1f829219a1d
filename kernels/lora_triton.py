# mypy: ignore-errors
"""What LoRA adapters add to a batch whose rows have different ones: y += (x @ A.T) @ B, with A and B of the row.

Rows of one adapter lie side by side, in a segment. Adapters lie where they were loaded and may differ in rank: the
kernels find them by address. One layer takes two launches, whatever the number of segments. In Triton's interpreter
(TRITON_INTERPRET=1) they run on a CPU, in float16 and float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_RANK = 256
_PROGRAMS = 264  # two for each processor of an H100; with fewer row tiles, programs share the columns of x
_FEWEST_COLUMNS = 512  # of a share
_BK = 64


class RowTiles(NamedTuple):
    """Which rows each program computes.

    tiles: (count, 3) int64: number of the segment, first row, end of the segment. block_m: rows of a tile.
    rank: the largest, padded for the tensor cores.
    """

    tiles: Tensor
    block_m: int
    rank: int


def row_tiles(segments: Sequence[tuple[int, int]], most_rank: int, device: torch.device) -> RowTiles:
    """Cut segments, (first row, end) each and perhaps empty, into tiles.

    Raises:
        ValueError: most_rank, of all adapters, is above MOST_RANK.
    """
    if most_rank > MOST_RANK:
        raise ValueError(f"rank {most_rank} is above {MOST_RANK}, the most of this kernel")
    rank = max(16, triton.next_power_of_2(most_rank))
    longest = max((end - first for first, end in segments), default=0)
    block_m = 16 if longest <= 16 else 32 if longest <= 32 or rank > 64 else 64
    tiles = [(number, row, end) for number, (first, end) in enumerate(segments) for row in range(first, end, block_m)]
    return RowTiles(torch.tensor(tiles, dtype=torch.int64, device=device).view(-1, 3), block_m, rank)


def table_entry(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """Return a table's entry for one layer of an adapter: the addresses of a (rank, K) and b (rank, N), and the rank.

    Raises:
        ValueError: other shapes, not contiguous, or not at a multiple of 16 bytes.
    """
    entry = a.data_ptr(), b.data_ptr(), a.shape[0]
    if b.shape[0] != a.shape[0] or not (a.is_contiguous() and b.is_contiguous()) or (entry[0] | entry[1]) % 16:
        raise ValueError(f"a {tuple(a.shape)}, b {tuple(b.shape)}; want (rank, K), (rank, N), contiguous, 16-aligned")
    return entry


def warm_lora_rows(rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what `add_lora_rows` launches where the largest rank of a pass is this, for tiles of every size."""
    a, b = torch.zeros(2, rank, _BK, dtype=dtype, device=device)
    table = torch.tensor([table_entry(a, b)], dtype=torch.int64, device=device)
    for rows in (16, 32, 64):
        x = torch.zeros(rows, _BK, dtype=dtype, device=device)
        add_lora_rows(torch.zeros_like(x), x, table, row_tiles([(0, rows)], rank, device))


def add_lora_rows(y: Tensor, x: Tensor, table: Tensor, tiles: RowTiles) -> None:
    """Add to y, in place, what the adapter of each segment makes of its rows of x. Other rows are left alone.

    Sums are in float32; x @ A.T is rounded to the dtype of x, and y once. The same input gives the same bits.

    Args:
        y: (M, N). x: (M, K), in one dtype, that of the adapters; columns contiguous.
        table: (segments, 3) int64, table_entry of each segment's adapter; zeros where it leaves this layer alone.
        tiles: of the segments, all within M rows.
    Raises:
        ValueError: incompatible shapes, dtypes or strides.
    """
    (M, N), K = y.shape, x.shape[1]
    if x.shape[0] != M or x.dtype != y.dtype or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(
            f"y {tuple(y.shape)} {y.dtype}, x {tuple(x.shape)} {x.dtype}; want rows of one dtype, columns contiguous"
        )
    if table.dtype != torch.int64 or table.shape[1:] != (3,) or table.stride(1) != 1:
        raise ValueError(f"the table is {tuple(table.shape)} {table.dtype}; want (segments, 3) int64")
    count, block_m, rank = tiles.tiles.shape[0], tiles.block_m, tiles.rank
    if not count:
        return
    splits = max(1, min(triton.cdiv(_PROGRAMS, count), K // _FEWEST_COLUMNS))
    share = triton.cdiv(triton.cdiv(K, splits), _BK) * _BK
    splits = triton.cdiv(K, share)
    low = torch.empty((splits, M, rank), dtype=torch.float32, device=x.device)
    shrink_rows[count, splits](
        *(x, table, tiles.tiles, low, M, K, x.stride(0), table.stride(0), share),
        R=rank,
        BM=block_m,
        BK=_BK,
        num_warps=4,
        num_stages=3,
    )
    block_n = 64 if rank > 64 else 128
    expand_rows[count, triton.cdiv(N, block_n)](
        *(y, table, tiles.tiles, low, M, N, y.stride(0), table.stride(0), splits),
        R=rank,
        BM=block_m,
        BN=block_n,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["M", "table_stride"], do_not_specialize_on_alignment=["table_ptr", "tiles_ptr"])
def shrink_rows(
    x_ptr, table_ptr, tiles_ptr, low_ptr, M, K, stride_x, table_stride, share,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute low (splits, M, R) = x @ A.T, each split over a share of the columns. Grid: (tiles, splits)."""
    tile = tiles_ptr + 3 * tl.program_id(0)
    entry = table_ptr + tl.load(tile) * table_stride
    rank = tl.load(entry + 2).to(tl.int32)
    if rank > 0:
        a_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
        rows = tl.load(tile + 1) + tl.arange(0, BM)
        inside = (rows < tl.load(tile + 2))[:, None]
        r, k = tl.arange(0, R), tl.arange(0, BK)
        first = tl.program_id(1) * share
        x_at = x_ptr + rows[:, None] * stride_x + k[None, :]
        a_at = a_ptr + r[None, :] * K + k[:, None]
        acc = tl.zeros((BM, R), tl.float32)
        for start in range(first, tl.minimum(first + share, K), BK):
            left = K - start
            x = tl.load(x_at + start, mask=inside & (k[None, :] < left), other=0.0)
            a = tl.load(a_at + start, mask=(r[None, :] < rank) & (k[:, None] < left), other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        low_at = low_ptr + (tl.program_id(1) * M + rows)[:, None] * R + r[None, :]
        tl.store(low_at, acc, mask=inside)


@triton.jit(
    do_not_specialize=["M", "table_stride", "splits"], do_not_specialize_on_alignment=["table_ptr", "tiles_ptr"]
)
def expand_rows(
    y_ptr, table_ptr, tiles_ptr, low_ptr, M, N, stride_y, table_stride, splits,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute y += low @ B, low summed over its splits in order. Grid: (tiles, N / BN rounded up)."""
    tile = tiles_ptr + 3 * tl.program_id(0)
    entry = table_ptr + tl.load(tile) * table_stride
    rank = tl.load(entry + 2).to(tl.int32)
    if rank > 0:
        b_ptr = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(y_ptr.dtype.element_ty)), 16)
        rows = tl.load(tile + 1) + tl.arange(0, BM)
        inside = (rows < tl.load(tile + 2))[:, None]
        r, n = tl.arange(0, R), tl.program_id(1) * BN + tl.arange(0, BN)
        low_at = low_ptr + rows[:, None] * R + r[None, :]
        low = tl.zeros((BM, R), tl.float32)
        for split in range(splits):
            low += tl.load(low_at + split * M * R, mask=inside, other=0.0)
        low = tl.where(r[None, :] < rank, low, 0.0)  # above the rank, infinite x has left NaN
        b = tl.load(b_ptr + r[:, None] * N + n[None, :], mask=(r[:, None] < rank) & (n[None, :] < N), other=0.0)
        y_at, wanted = y_ptr + rows[:, None] * stride_y + n[None, :], inside & (n[None, :] < N)
        acc = tl.load(y_at, mask=wanted, other=0.0).to(tl.float32)
        acc = tl.dot(low.to(b.dtype), b, acc, input_precision="ieee")
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=wanted)
