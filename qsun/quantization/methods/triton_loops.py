# mypy: ignore-errors
"""The loops of `loops.py` for a GPU in Triton: all columns of a block in one launch, a few rows in each program.

A column needs what the columns before it changed: their changes, which stay in registers, times their entries of the
factor or the Hessian. In torch each column takes four launches. Divisions round to nearest and nothing is fused, as in
torch; sums of changes have an order of their own, which is always the same.

In Triton's interpreter (TRITON_INTERPRET=1) they run on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun.quantization.methods.torch_loops import least_error, refit_groups

__all__ = ["descend_columns", "least_error", "round_columns"]
_ROWS = 16  # of a program
_WIDEST = 128  # columns of a launch: their changes are in registers


@triton.jit
def _nearest(weight, scale, zero, top):
    level = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -1048576.0), 1048576.0)
    level = (level + 12582912.0) - 12582912.0  # float32's step there is 1: to the nearest integer, half to even
    return tl.minimum(tl.maximum(level + zero, 0.0), top)


@triton.jit
def _grid_at(scales_ptr, zeros_ptr, at, inside):
    return tl.load(scales_ptr + at, mask=inside, other=1.0), tl.load(zeros_ptr + at, mask=inside, other=0.0)


@triton.jit
def _effect(changes, matrix_ptr, i, columns, B: tl.constexpr):
    """Return the sum of the changes of the columns before i, each times its entry in column i of a square matrix."""
    column = tl.arange(0, B)
    entries = tl.load(matrix_ptr + column * columns + i, mask=column < i, other=0.0)
    return tl.sum(changes * entries[:, None], 0)


@triton.jit
def round_block(
    block_ptr, factor_ptr, scales_ptr, zeros_ptr, groups_ptr, integers_ptr, errors_ptr, columns, rows, top,
    B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    errors = tl.zeros((B, R), tl.float32)
    for i in tl.range(columns):
        weight = tl.load(block_ptr + i * rows + row, mask=inside, other=0.0)
        weight -= _effect(errors, factor_ptr, i, columns, B)
        scale, zero = _grid_at(scales_ptr, zeros_ptr, tl.load(groups_ptr + i) * rows + row, inside)
        level = _nearest(weight, scale, zero, top)
        error = tl.div_rn(weight - (level - zero) * scale, tl.load(factor_ptr + i * columns + i))
        tl.store(integers_ptr + i * rows + row, level, mask=inside)
        tl.store(errors_ptr + i * rows + row, error, mask=inside)
        errors = tl.where(tl.arange(0, B)[:, None] == i, error[None, :], errors)


@triton.jit
def move_block(
    integers_ptr, quantized_ptr, scales_ptr, zeros_ptr, pull_ptr, hessian_ptr, changes_ptr, columns, rows, size, top,
    B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < rows
    changes = tl.zeros((B, R), tl.float32)
    for i in tl.range(columns):
        at = i * rows + row
        weight = tl.load(quantized_ptr + at, mask=inside, other=0.0)
        pull = tl.load(pull_ptr + at, mask=inside, other=0.0) - _effect(changes, hessian_ptr, i, columns, B)
        scale, zero = _grid_at(scales_ptr, zeros_ptr, (i // size) * rows + row, inside)
        step = tl.div_rn(1.0, tl.load(hessian_ptr + i * columns + i))
        level = _nearest(weight + pull * step, scale, zero, top)
        moved = (level - zero) * scale
        tl.store(integers_ptr + at, level, mask=inside)
        tl.store(quantized_ptr + at, moved, mask=inside)
        tl.store(changes_ptr + at, moved - weight, mask=inside)
        changes = tl.where(tl.arange(0, B)[:, None] == i, (moved - weight)[None, :], changes)


def round_columns(
    block: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Implement `Loops.round_columns`."""
    integers, errors = torch.empty_like(block), torch.empty_like(block)
    grid = [t.contiguous() for t in (scales, zeros)]
    block = block.contiguous() if len(block) <= _WIDEST else block.clone()
    for start in range(0, len(block), _WIDEST):
        here, later = slice(start, start + _WIDEST), slice(start + _WIDEST, None)
        part, local = block[here], factor[here, here].contiguous()
        found = integers[here], errors[here]
        _launch(round_block, part, part, local, *grid, groups[here].contiguous(), *found, *part.shape, float(top))
        block[later].addmm_(factor[here, later].t(), errors[here], alpha=-1)
    return integers, errors


def descend_columns(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    pull: Tensor,
    hessian: Tensor,
    size: int,
    rounding: tuple[int, torch.dtype],
) -> Tensor:
    """Implement `Loops.descend_columns`."""
    assert all(t.is_contiguous() for t in state)
    before, changes, hessian = state[1].clone(), torch.empty_like(state[1]), hessian.contiguous()
    _launch(move_block, pull, *state, pull.contiguous(), hessian, changes, *pull.shape, size, float(rounding[0]))
    refit_groups(state, torch.addmm(pull, hessian, changes, alpha=-1), hessian, size, rounding[1])
    return before - state[1]


def _launch(kernel, block: Tensor, *arguments) -> None:
    columns, rows = block.shape
    with torch.cuda.device_of(block):
        kernel[(triton.cdiv(rows, _ROWS),)](
            *arguments, B=max(16, triton.next_power_of_2(columns)), R=_ROWS, num_warps=2, enable_fp_fusion=False
        )
