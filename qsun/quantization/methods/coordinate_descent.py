"""Coordinate descent: revisit integers and refit scales until the layer's output error stops falling.

GPTQ fixes each column once, before later ones are rounded. Here every integer in turn moves to the
minimum of ``trace((W - Q) H (W - Q)^T)`` with all others fixed, and each group's scale to its least-squares value; both
steps can only lower the error (but for the rounding of a scale to its stored dtype, which is checked).

A change of one column moves the gradient of all others. It is applied at once to the next few columns, later and as
one matrix product to the rest of the block, and later still to the rest of the matrix: the same sums, at BLAS speed.

Source: the cyclic coordinate descent of QuantEase (arXiv 2309.01885), with the scale step added.
"""

import torch
from torch import Tensor

from qsun.quantization.methods.grid import Grid, round_scales, round_to_grid

_OUTER, _INNER = 128, 32  # columns; every group size but -1 divides _OUTER


class _State:
    """The matrix being descended on, transposed: a column of weights is then one run of memory.

    Attributes:
        integers, quantized: (K, N) float. scales, zeros: (G, N) float.
        pull: (K, N), H (W - Q)^T: minus half the gradient with respect to the quantized weights.
    """

    def __init__(self, weight: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, grid: Grid):
        self.hessian, self.grid = hessian, grid
        self.size = weight.shape[1] // scales.shape[1]
        self.integers = q.t().clone(memory_format=torch.contiguous_format)
        self.scales, self.zeros = scales.t().clone(memory_format=torch.contiguous_format), zeros.t().contiguous()
        self.quantized = (self.integers - self.each(self.zeros)) * self.each(self.scales)
        self.pull = hessian @ (weight.t() - self.quantized)

    def each(self, by_group: Tensor) -> Tensor:
        """Return (K, N) from (G, N)."""
        return by_group.repeat_interleave(self.size, 0)


def descend(
    weight: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, hessian: Tensor, grid: Grid, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Lower the output error of a quantized matrix whose groups are contiguous.

    Args:
        weight, q: (N, K) float; q holds whole numbers.
        scales, zeros: (N, G) float.
        hessian: (K, K), damped: its diagonal must not be zero.
        sweeps: passes over all columns.
    Returns:
        q and scales, new tensors.
    """
    state = _State(weight, q, scales, zeros, hessian, grid)
    K = weight.shape[1]
    for _ in range(sweeps):
        for start in range(0, K, _OUTER):
            _sweep_block(state, slice(start, min(start + _OUTER, K)))
        if state.size > _OUTER:
            for group in range(len(state.scales)):
                _refit_scale(state, group, slice(group * state.size, (group + 1) * state.size), state.pull, 0)
    return state.integers.t().contiguous(), state.scales.t().contiguous()


def _sweep_block(state: _State, block: slice) -> None:
    """Move the integers of a block of columns, refit the scales of the groups inside it, and tell all other columns."""
    before = state.quantized[block].clone()
    pull, local = state.pull[block].clone(), state.hessian[block, block]
    for start in range(block.start, block.stop, _INNER):
        columns = slice(start, min(start + _INNER, block.stop))
        change = _move_integers(state, columns, pull[columns.start - block.start : columns.stop - block.start])
        pull.addmm_(local[:, columns.start - block.start : columns.stop - block.start], change, alpha=-1)
    if state.size <= _OUTER:
        for start in range(block.start, block.stop, state.size):
            _refit_scale(state, start // state.size, slice(start, start + state.size), pull, block.start)
    state.pull.addmm_(state.hessian[:, block], before - state.quantized[block])


def _move_integers(state: _State, columns: slice, pull: Tensor) -> Tensor:
    """Pass over a few columns once; `pull` is theirs. Returns the (columns, N) change of the weights."""
    pull, local = pull.clone(), state.hessian[columns, columns]
    step = local.diagonal().reciprocal()
    change = torch.empty_like(pull)
    for i, column in enumerate(range(columns.start, columns.stop)):
        scale, zero = state.scales[column // state.size], state.zeros[column // state.size]
        best = torch.addcmul(state.quantized[column], pull[i], step[i])
        state.integers[column] = round_to_grid(best, scale, zero, state.grid.top)
        moved = (state.integers[column] - zero) * scale
        change[i] = moved - state.quantized[column]
        state.quantized[column] = moved
        pull[i + 1 :].addr_(local[i, i + 1 :], change[i], alpha=-1)
    return change


def _refit_scale(state: _State, group: int, columns: slice, pull: Tensor, offset: int) -> None:
    """Give a group its least-squares scales. pull: of columns from `offset` on; kept true where the group moves it."""
    here = slice(columns.start - offset, columns.stop - offset)
    levels = state.integers[columns] - state.zeros[group]
    slope = (levels * pull[here]).sum(0)
    curvature = (levels * (state.hessian[columns, columns] @ levels)).sum(0).clamp(min=1e-12)
    scale = state.scales[group]
    refit = round_scales(scale + slope / curvature, state.grid)
    move = refit - scale
    move = torch.where(move * (2 * slope - move * curvature) > 0, move, torch.zeros_like(move))
    state.scales[group] = scale + move
    state.quantized[columns] = levels * state.scales[group]
    rows = slice(offset, offset + len(pull))
    pull.addmm_(state.hessian[rows, columns], levels * move, alpha=-1)
