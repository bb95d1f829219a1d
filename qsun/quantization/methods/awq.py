"""AWQ: scale up the input channels that matter before rounding, and clip each group's range.

Source: Lin et al., "AWQ", arXiv 2306.00978, section 3.2; the clipping search is the one of its released code.

The inverse scale is folded into whatever produces the input: a norm, or the rows of up_proj for down_proj. It is never
folded into v_proj for o_proj: a decode module attends to K and V that unscaled prefill modules wrote.

Errors are measured on the statistics alone: ``|(W - Q) X|^2 = trace((W - Q) H (W - Q)^T)``, so the search needs no
forward pass.
"""

import torch
from torch import Tensor

from qsun.model.quantized import Quantized
from qsun.quantization.methods.grid import Grid, minmax_scales
from qsun.quantization.methods.rtn import quantize_nearest

_GRID_POINTS = 20
_CLIP_STEPS, _CLIP_STEP = 10, 0.05
_PIECE_ELEMENTS = 1 << 22


def channel_scales(weights: list[Tensor], hessian: Tensor, mean_abs: Tensor, grid: Grid) -> Tensor:
    """Return per-input-channel scales for linear layers that share an input.

    Args:
        weights: (N_i, K) each.
        hessian: (K, K) mean of x x^T.
        mean_abs: (K,) mean of |x|.
    Returns:
        (K,) float32, s: use W * s with the input divided by s. All ones where no scaling helps.
    """
    hessian, activity = hessian.float(), mean_abs.float().clamp(min=1e-6)
    best, best_error = torch.ones_like(activity), float("inf")
    for point in range(_GRID_POINTS):
        scales = activity.pow(point / _GRID_POINTS).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(_scaled_error(weight.float(), scales, hessian, grid) for weight in weights)
        if error < best_error:
            best, best_error = scales, error
    return best


def _scaled_error(weight: Tensor, scales: Tensor, hessian: Tensor, grid: Grid) -> float:
    scaled = weight * scales
    difference = quantize_nearest(scaled, *minmax_scales(scaled, grid), grid).dequantize() / scales - weight
    return float(((difference @ hessian) * difference).sum())


def awq(weight: Tensor, hessian: Tensor, grid: Grid) -> Quantized:
    """Quantize a (scaled) weight matrix to nearest, each group clipped where that lowers its output error.

    Args:
        weight: (N, K) float.
        hessian: (K, K) mean of x x^T of the (scaled) inputs.
        grid: group_size must divide K.
    """
    return quantize_nearest(weight, *clipped_scales(weight, hessian, grid), grid)


def clipped_scales(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return (N, G) scales and zeros: the range of each group with the least error in the layer's output."""
    K = weight.shape[1]
    groups = grid.groups(K)
    size = K // groups
    blocks = torch.stack([hessian[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    pieces = weight.float().split(max(1, _PIECE_ELEMENTS // K))
    found = [_clip_rows(piece, blocks.float(), grid) for piece in pieces]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _clip_rows(weight: Tensor, blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    best_scales, best_zeros = minmax_scales(weight, grid)
    best_error = torch.full_like(best_scales, float("inf"))
    for step in range(_CLIP_STEPS):
        scales, zeros = minmax_scales(weight, grid, 1 - step * _CLIP_STEP)
        difference = quantize_nearest(weight, scales, zeros, grid).dequantize() - weight
        difference = difference.reshape(*scales.shape, -1).transpose(0, 1)
        error = ((difference @ blocks) * difference).sum(-1).t()
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
