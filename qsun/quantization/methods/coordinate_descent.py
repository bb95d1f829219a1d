"""Coordinate descent: revisit integers and refit scales until the layer's output error stops falling.

GPTQ fixes each column once, before later ones are rounded. Here every integer in turn moves to the
minimum of ``trace((W - Q) H (W - Q)^T)`` with all others fixed, and each group's scale to its least-squares value; both
steps can only lower the error (but for the rounding of a scale to its stored dtype, which is checked).

A change of one column moves the gradient of all others. It is applied at once to its block of columns (loops.py), and
as one matrix product to the rest of the matrix: the same sums, at BLAS speed.

Source: the cyclic coordinate descent of QuantEase (arXiv 2309.01885), with the scale step added.
"""

import torch
from torch import Tensor

from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.loops import loops_on
from qsun.quantization.methods.torch_loops import refit

_BLOCK = 128  # columns; every group size but -1 divides it


def descend(
    weight: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, grid: Grid, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Lower the output error of a quantized matrix whose groups are contiguous.

    Args:
        weight, q: (K, N) float, contiguous; q holds whole numbers.
        scales, zeros: (G, N) float.
        hessian: (K, K), damped: its diagonal must not be zero.
        sweeps: passes over all columns.
    Returns:
        q and scales, new tensors.
    """
    K, size = len(weight), len(weight) // len(scales)
    q, scales = q.clone(), scales.clone()
    quantized = (q - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)
    pull = hessian @ (weight - quantized)  # minus half the gradient with respect to the quantized weights
    for sweep in range(sweeps):
        for start in range(0, K, _BLOCK):
            block = slice(start, min(start + _BLOCK, K))
            here = slice(start // size, -(-block.stop // size))
            state = q[block], quantized[block], scales[here], zeros[here]
            local = hessian[block, block]
            rounding = grid.top, grid.scale_dtype
            change = loops_on(weight.device).descend_columns(state, pull[block], local, size, rounding)
            last = sweep == sweeps - 1 and size <= _BLOCK  # then nobody reads the pull of columns that are done
            told = slice(block.stop if last else 0, K)
            pull[told].addmm_(hessian[told, block], change)
        if size > _BLOCK:
            _refit_row(q, quantized, scales, zeros, pull, hessian, grid)
    return q, scales


def _refit_row(
    q: Tensor, quantized: Tensor, scales: Tensor, zeros: Tensor, pull: Tensor, hessian: Tensor, grid: Grid
) -> None:
    """Refit scales of groups as wide as a row, in place."""
    levels = q - zeros
    move = refit(levels, scales[0], pull, hessian, grid.scale_dtype)
    scales[0] += move
    torch.mul(levels, scales, out=quantized)
    pull.addmm_(hessian, levels * move, alpha=-1)
