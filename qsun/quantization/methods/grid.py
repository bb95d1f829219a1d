"""The integer grid: what a group of weights can be, and which scale and zero point suit it.

Grids are chosen so that one result can be written in every format (docs/formats.md):

* scales are rounded to what the served model will hold *before* anything is quantized with them;
* zero points lie in [1, 2^bits - 1]: GPTQ v1 stores ``zero - 1``, so 0 would wrap around;
* a symmetric grid is -2^(b-1) .. 2^(b-1)-1 with a *signed* scale: the longer arm goes to the side with the larger
  weight. At 2 bits (-2, -1, 0, 1) that is a quarter of the range, and every reader of ``(q - zero) * scale`` takes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-20  # a subnormal fp16; an all-zero group must not divide by zero
_COARSE, _FINE, _NARROWEST = 10, 3, 0.4
_CHUNK_ELEMENTS = 1 << 18  # candidates are tried on pieces that stay in the cache


@dataclass(frozen=True)
class Grid:
    """bits, group_size (-1: one group a row), symmetry and the dtype that scales are rounded to."""

    bits: int
    group_size: int
    sym: bool
    scale_dtype: torch.dtype = torch.float16

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size


def round_scales(scales: Tensor, grid: Grid) -> Tensor:
    """Round scales to what the file will hold (fp16, or bf16 values that fp16 holds), never zero."""
    small = scales.abs() < SMALLEST_SCALE
    scales = torch.where(small, torch.where(scales < 0, -SMALLEST_SCALE, SMALLEST_SCALE), scales)
    return scales.clamp(-65000, 65000).to(grid.scale_dtype).to(torch.float16).float()


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Return the nearest grid integers, as floats; scales and zeros broadcast against weight."""
    return (weight / scales).round_().add_(zeros).clamp_(0, top)


def search_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each group with the least weighted squared error.

    Shrinking the range trades clipped outliers for finer steps; the best shrink is searched coarse to fine.

    Args:
        weight: (N, K) float.
        importance: (K,) non-negative weight of a squared error in each column; None: all equal.
    Returns:
        scales, zeros: (N, G) float32 each; zeros are whole numbers.
    """
    N, K = weight.shape
    G = grid.groups(K)
    grouped = weight.float().reshape(N, G, K // G)
    columns = torch.ones(G, K // G, device=weight.device) if importance is None else importance.float().reshape(G, -1)
    scales, zeros = (torch.empty(N, G, device=weight.device) for _ in range(2))
    rows = max(1, _CHUNK_ELEMENTS // K)
    for start in range(0, N, rows):
        piece = slice(start, start + rows)
        scales[piece], zeros[piece] = _search_piece(grouped[piece], grid, columns)
    return scales, zeros


def minmax_scales(weight: Tensor, grid: Grid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that cover `shrink` of each group's range; shapes as `search_scales`."""
    N, K = weight.shape
    grouped = weight.float().reshape(N, grid.groups(K), -1)
    return next(_candidates(grouped, grid, torch.full(grouped.shape[:2], shrink, device=weight.device), step=0.0))


def _search_piece(grouped: Tensor, grid: Grid, columns: Tensor) -> tuple[Tensor, Tensor]:
    best_error = torch.full(grouped.shape[:2], float("inf"), device=grouped.device)
    best_shrink = torch.ones_like(best_error)
    best_scales, best_zeros = torch.ones_like(best_error), torch.ones_like(best_error)

    def offer(shrink: Tensor, step: float) -> None:
        for scales, zeros in _candidates(grouped, grid, shrink, step):
            error = round_to_grid(grouped, scales[..., None], zeros[..., None], grid.top)
            error.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(grouped).square_()
            error = torch.einsum("ngk,gk->ng", error, columns)
            better = error < best_error
            for best, new in (
                (best_error, error),
                (best_shrink, shrink),
                (best_scales, scales),
                (best_zeros, zeros),
            ):
                torch.where(better, new, best, out=best)

    step = (1 - _NARROWEST) / (_COARSE - 1)
    for i in range(_COARSE):
        offer(torch.full_like(best_error, 1 - step * i), step)
    centre = best_shrink.clone()
    for i in range(1, _FINE):
        offer(centre + step * i / _FINE, step)
        offer(centre - step * i / _FINE, step)
    return best_scales, best_zeros


def _candidates(grouped: Tensor, grid: Grid, shrink: Tensor, step: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield grids that cover `shrink` of each group's range; only the plain one for step = 0."""
    high, low = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
    if grid.sym:
        scales = torch.maximum(high, -low) * shrink / (grid.middle - 0.5)
        middle = torch.full_like(scales, float(grid.middle))
        yield round_scales(scales, grid), middle
        if step:
            yield round_scales(-scales, grid), middle
        return
    scales = round_scales((high - low) * shrink / grid.top, grid)
    zeros = (-low * shrink / scales).round()
    yield scales, zeros.clamp(1, grid.top)
    if grid.bits <= 3 and step:  # with few levels the best zero is often a neighbour
        yield scales, (zeros - 1).clamp(1, grid.top)
        yield scales, (zeros + 1).clamp(1, grid.top)
