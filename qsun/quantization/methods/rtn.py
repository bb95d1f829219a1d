"""Round to nearest: no calibration, the baseline that every other pass must beat."""

import torch
from torch import Tensor

from qsun.model.quantized import Quantized
from qsun.quantization.methods.grid import Grid, minmax_scales, search_scales
from qsun.quantization.methods.rounding import round_to_grid


def rtn(weight: Tensor, grid: Grid, *, scale_search: bool = True) -> Quantized:
    """Quantize each weight to the nearest grid point.

    Args:
        weight: (N, K) float.
        grid: group_size must divide K.
        scale_search: shrink each group's range where that lowers its squared error; False covers the whole range.
    """
    scales, zeros = search_scales(weight, grid) if scale_search else minmax_scales(weight, grid)
    return quantize_nearest(weight, scales, zeros, grid)


def quantize_nearest(weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Quantized:
    """Return the nearest integers for given (N, G) scales and zeros."""
    N, K = weight.shape
    grouped = weight.float().reshape(N, scales.shape[1], -1)
    q = round_to_grid(grouped, scales[..., None], zeros[..., None], grid.top)
    return Quantized(q.reshape(N, K).to(torch.uint8), scales.t().contiguous(), zeros.t().to(torch.uint8).contiguous())
