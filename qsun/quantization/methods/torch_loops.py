"""The loops of `loops.py` in torch: where neither numba nor Triton does them."""

import torch
from torch import Tensor

from qsun.quantization.methods.rounding import round_scales, round_to_grid

_INNER = 32  # columns that learn of a change at once; the others of the block learn of it in one product


def least_error(weight: Tensor, scales: Tensor, zeros: Tensor, importance: Tensor, top: int) -> Tensor:
    """Implement `Loops.least_error`."""
    grouped = weight.unflatten(1, (scales.shape[2], -1))
    columns = importance.reshape(scales.shape[2], -1)
    best = torch.full(scales.shape[1:], float("inf"), device=weight.device)
    found = torch.zeros(scales.shape[1:], dtype=torch.int64, device=weight.device)
    for number, (scale, zero) in enumerate(zip(scales[..., None], zeros[..., None], strict=True)):
        error = round_to_grid(grouped, scale, zero, top).sub_(zero).mul_(scale).sub_(grouped).square_()
        error = torch.einsum("ngk,gk->ng", error, columns)
        better = error < best
        best = torch.where(better, error, best)
        found.masked_fill_(better, number)
    return found


def round_columns(
    block: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Implement `Loops.round_columns`."""
    block, scale, zero = block.clone(), scales[groups], zeros[groups]
    errors, integers = torch.empty_like(block), torch.empty_like(block)
    for start in range(0, len(block), _INNER):
        stop = min(start + _INNER, len(block))
        for i in range(start, stop):
            integers[i] = round_to_grid(block[i], scale[i], zero[i], top)
            errors[i] = (block[i] - (integers[i] - zero[i]) * scale[i]) / factor[i, i]
            block[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i], alpha=-1)
        block[stop:].addmm_(factor[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    return integers, errors


def descend_columns(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    pull: Tensor,
    hessian: Tensor,
    size: int,
    rounding: tuple[int, torch.dtype],
) -> Tensor:
    """Implement `Loops.descend_columns`."""
    quantized = state[1]
    before, pull = quantized.clone(), pull.clone()
    for start in range(0, len(pull), _INNER):
        columns = slice(start, min(start + _INNER, len(pull)))
        change = _move_integers(state, columns, pull[columns], hessian[columns, columns], size, rounding[0])
        pull.addmm_(hessian[:, columns], change, alpha=-1)
    refit_groups(state, pull, hessian, size, rounding[1])
    return before - quantized


def refit_groups(
    state: tuple[Tensor, Tensor, Tensor, Tensor], pull: Tensor, hessian: Tensor, size: int, dtype: torch.dtype
) -> None:
    """Refit the scales of the groups inside a block, one after another; state and pull are changed in place."""
    integers, quantized, scales, zeros = state
    for group in range(len(scales) if size <= len(pull) else 0):
        columns = slice(group * size, (group + 1) * size)
        levels = integers[columns] - zeros[group]
        move = refit(levels, scales[group], pull[columns], hessian[columns, columns], dtype)
        scales[group] += move
        quantized[columns] = levels * scales[group]
        pull.addmm_(hessian[:, columns], levels * move, alpha=-1)


def _move_integers(
    state: tuple[Tensor, Tensor, Tensor, Tensor], columns: slice, pull: Tensor, hessian: Tensor, size: int, top: int
) -> Tensor:
    """Pass over a few columns once; `pull` and `hessian` are theirs. Returns the (columns, N) change of the weights."""
    integers, quantized, scales, zeros = state
    pull, step = pull.clone(), hessian.diagonal().reciprocal()
    change = torch.empty_like(pull)
    for i, column in enumerate(range(columns.start, columns.stop)):
        scale, zero = scales[column // size], zeros[column // size]
        best = torch.addcmul(quantized[column], pull[i], step[i])
        integers[column] = round_to_grid(best, scale, zero, top)
        moved = (integers[column] - zero) * scale
        change[i] = moved - quantized[column]
        quantized[column] = moved
        pull[i + 1 :].addr_(hessian[i, i + 1 :], change[i], alpha=-1)
    return change


def refit(levels: Tensor, scale: Tensor, pull: Tensor, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far a group's scale moves to its least-squares value; 0 where rounding would make that worse.

    Args:
        levels: (S, N), integers minus zero points. scale: (N,). pull: (S, N). hessian: (S, S).
        dtype: that scales are stored in.
    """
    slope = (levels * pull).sum(0)
    curvature = (levels * (hessian @ levels)).sum(0).clamp(min=1e-12)
    move = round_scales(scale + slope / curvature, dtype) - scale
    return torch.where(move * (2 * slope - move * curvature) > 0, move, torch.zeros_like(move))
