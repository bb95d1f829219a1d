"""The integer grid: what a group of weights can be, and which scale and zero point suit it.

Grids are chosen so that one result can be written in every format (docs/formats.md):

* scales are rounded to what the served model will hold *before* anything is quantized with them;
* zero points lie in [1, 2^bits - 1]: GPTQ v1 stores ``zero - 1``, so 0 would wrap around;
* a symmetric grid is -2^(b-1) .. 2^(b-1)-1 with a *signed* scale: the longer arm goes to the side with the larger
  weight. At 2 bits (-2, -1, 0, 1) that is a quarter of the range, and every reader of ``(q - zero) * scale`` takes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.quantization.methods.loops import loops_on
from qsun.quantization.methods.rounding import round_scales

_COARSE, _FINE, _NARROWEST = 10, 3, 0.4
_CHUNK_ELEMENTS = 1 << 22  # of weights whose candidates are held at once


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


def search_scales(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of each group with the least weighted squared error.

    Shrinking the range trades clipped outliers for finer steps; the best shrink is searched coarse to fine.

    Args:
        weight: (N, K) float.
        importance: (K,) non-negative weight of a squared error in each column; None: all equal.
    Returns:
        scales, zeros: (N, G) float32 each; zeros are whole numbers.
    """
    K = weight.shape[1]
    weight = weight.float()
    importance = torch.ones(K, device=weight.device) if importance is None else importance.float()
    found = [_search_rows(piece, grid, importance) for piece in weight.split(max(1, _CHUNK_ELEMENTS // K))]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def minmax_scales(weight: Tensor, grid: Grid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that cover `shrink` of each group's range; shapes as `search_scales`."""
    N, K = weight.shape
    arms = _arms(weight.float().reshape(N, grid.groups(K), -1))
    return _candidates(arms, grid, torch.full_like(arms[0], shrink), step=0.0)[0]


def _search_rows(weight: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Search coarse, then fine around the best of it, which stays the first candidate."""
    arms = _arms(weight.unflatten(1, (grid.groups(weight.shape[1]), -1)))
    whole, step = torch.ones_like(arms[0]), (1 - _NARROWEST) / (_COARSE - 1)
    coarse = [_candidates(arms, grid, whole - step * i, step) for i in range(_COARSE)]
    number, best = _best(weight, [grid for grids in coarse for grid in grids], importance, grid.top)
    shrink = whole - step * (number // len(coarse[0]))
    fine = [_candidates(arms, grid, shrink + step * i / _FINE, step) for i in (1, -1, 2, -2)]
    return _best(weight, [best, *(grid for grids in fine for grid in grids)], importance, grid.top)[1]


def _best(
    weight: Tensor, candidates: list[tuple[Tensor, Tensor]], importance: Tensor, top: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the number of the best candidate of each group, (N, G), and its scales and zeros."""
    scales, zeros = (torch.stack([candidate[i] for candidate in candidates]) for i in (0, 1))
    number = loops_on(weight.device).least_error(weight, scales, zeros, importance, top)
    return number, (scales.gather(0, number[None])[0], zeros.gather(0, number[None])[0])


def _arms(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each group reaches to both sides of zero, (N, G) each."""
    return grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)


def _candidates(arms: tuple[Tensor, Tensor], grid: Grid, shrink: Tensor, step: float) -> list[tuple[Tensor, Tensor]]:
    """Return grids that cover `shrink` of each group's range; only the plain one for step = 0."""
    high, low = arms
    if grid.sym:
        scales = torch.maximum(high, -low) * shrink / (grid.middle - 0.5)
        middle = torch.full_like(scales, float(grid.middle))
        plain = round_scales(scales, grid.scale_dtype), middle
        return [plain, (round_scales(-scales, grid.scale_dtype), middle)] if step else [plain]
    scales = round_scales((high - low) * shrink / grid.top, grid.scale_dtype)
    zeros = (-low * shrink / scales).round()
    near = (0, -1, 1) if grid.bits <= 3 and step else (0,)  # with few levels the best zero is often a neighbour
    return [(scales, (zeros + move).clamp(1, grid.top)) for move in near]
