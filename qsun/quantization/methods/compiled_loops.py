"""The loops of `loops.py` compiled by numba: rows in tiles that stay in the cache, one thread for each run of tiles.

Innermost loops run over the rows of a tile and become vector instructions; no sum crosses rows, and no operation is
reordered (no fastmath), so results do not depend on the threads. Their number is torch's; numba's own are not used.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qsun.quantization.methods.rounding import LARGEST_SCALE, SMALLEST_SCALE

_ROWS = 256  # a tile of 128 columns takes 128 KiB: a few fit a second-level cache
_F = np.float32
_ZERO, _SMALLEST, _LARGEST = _F(0), _F(SMALLEST_SCALE), _F(LARGEST_SCALE)
_SMALLEST_NORMAL, _SUBNORMAL_STEPS = (
    _F(2.0**-14),
    _F(0.75),
)  # of fp16; float32 near 0.75 has the steps of its subnormals
_LEAST_CURVATURE = _F(1e-12)
_DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}  # of float32's mantissa


def _compile(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written to
        return njit(**options)(function)


def least_error(weight: Tensor, scales: Tensor, zeros: Tensor, importance: Tensor, top: int) -> Tensor:
    """Implement `Loops.least_error`."""
    found = torch.zeros(scales.shape[1:], dtype=torch.int64)
    arrays = [t.contiguous().numpy() for t in (weight, scales, zeros, importance, found)]
    _over_rows(_least_error, len(weight), *arrays, _F(top))
    return found


def round_columns(
    block: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Implement `Loops.round_columns`."""
    integers, errors = torch.empty_like(block), torch.empty_like(block)
    arrays = [t.contiguous().numpy() for t in (block, factor, scales, zeros, groups, integers, errors)]
    _over_rows(_round_columns, block.shape[1], *arrays, _F(top))
    return integers, errors


def descend_columns(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    pull: Tensor,
    hessian: Tensor,
    size: int,
    rounding: tuple[int, torch.dtype],
) -> Tensor:
    """Implement `Loops.descend_columns`."""
    change = torch.empty_like(pull)
    arrays = [t.contiguous().numpy() for t in (*state, pull, hessian, change)]
    _over_rows(_descend_columns, pull.shape[1], *arrays, size, _F(rounding[0]), _DROPPED_BITS[rounding[1]])
    return change


def _over_rows(loop: Any, rows: int, *arguments: Any) -> None:
    """Call `loop(*arguments, first, last)` for runs of whole tiles, each on a thread of its own."""
    tiles = -(-rows // _ROWS)
    threads = min(torch.get_num_threads(), tiles)
    ends = [min(tiles * number // threads * _ROWS, rows) for number in range(threads + 1)]
    if threads == 1:
        loop(*arguments, 0, rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loop, *arguments, *run) for run in pairwise(ends)]:
            done.result()


@_compile
def _nearest(weight, scale, zero, top):
    level = np.rint(weight / scale) + zero
    level = _ZERO if level < _ZERO else level
    return top if level > top else level


@_compile
def _load(source, start, tile):
    """Copy rows of a (B, N) matrix, from `start` on, into a (B, rows) tile."""
    for i in range(tile.shape[0]):
        line, column = tile[i], source[i, start : start + tile.shape[1]]
        for r in range(tile.shape[1]):
            line[r] = column[r]


@_compile
def _store(tile, start, target):
    for i in range(tile.shape[0]):
        line, column = tile[i], target[i, start : start + tile.shape[1]]
        for r in range(tile.shape[1]):
            column[r] = line[r]


@_compile
def _subtract(target, factor, source):
    for r in range(target.shape[0]):
        target[r] -= factor * source[r]


@_compile
def _least_error(weight, scales, zeros, importance, found, top, first, last):
    candidates, _, groups = scales.shape
    size = weight.shape[1] // groups
    for start in range(first, last, _ROWS):
        rows = min(_ROWS, last - start)
        tile, best, error = np.empty((size, rows), _F), np.empty(rows, _F), np.empty(rows, _F)
        scale, zero = np.empty(rows, _F), np.empty(rows, _F)
        for group in range(groups):
            for r in range(rows):
                best[r] = np.inf
                for k in range(size):
                    tile[k, r] = weight[start + r, group * size + k]
            for candidate in range(candidates):
                for r in range(rows):
                    scale[r], zero[r] = scales[candidate, start + r, group], zeros[candidate, start + r, group]
                    error[r] = _ZERO
                for k in range(size):
                    _add_error(tile[k], scale, zero, importance[group * size + k], top, error)
                for r in range(rows):
                    if error[r] < best[r]:
                        best[r], found[start + r, group] = error[r], candidate


@_compile
def _add_error(weight, scale, zero, importance, top, error):
    for r in range(weight.shape[0]):
        wrong = (_nearest(weight[r], scale[r], zero[r], top) - zero[r]) * scale[r] - weight[r]
        error[r] += wrong * wrong * importance


@_compile
def _round_columns(block, factor, scales, zeros, groups, integers, errors, top, first, last):
    for start in range(first, last, _ROWS):
        rows = min(_ROWS, last - start)
        tile = np.empty((block.shape[0], rows), _F)
        _load(block, start, tile)
        for i in range(block.shape[0]):
            group, here = groups[i], slice(start, start + rows)
            level, error = integers[i, here], errors[i, here]
            _round_column(tile[i], scales[group, here], zeros[group, here], factor[i, i], top, level, error)
            for j in range(i + 1, block.shape[0]):
                _subtract(tile[j], factor[i, j], error)


@_compile
def _round_column(weight, scale, zero, pivot, top, level, error):
    for r in range(weight.shape[0]):
        level[r] = _nearest(weight[r], scale[r], zero[r], top)
        error[r] = (weight[r] - (level[r] - zero[r]) * scale[r]) / pivot


@_compile
def _descend_columns(integers, quantized, scales, zeros, pull, hessian, change, size, top, dropped, first, last):
    columns = pull.shape[0]
    for start in range(first, last, _ROWS):
        rows = min(_ROWS, last - start)
        level, weight = np.empty((columns, rows), _F), np.empty((columns, rows), _F)
        slope = np.empty((columns, rows), _F)
        scale, zero = np.empty((scales.shape[0], rows), _F), np.empty((scales.shape[0], rows), _F)
        moved = np.empty(rows, _F)
        _load(quantized, start, weight)
        _load(pull, start, slope)
        _load(scales, start, scale)
        _load(zeros, start, zero)
        for i in range(columns):
            group = i // size
            _move(weight[i], slope[i], hessian[i, i], scale[group], zero[group], top, level[i], moved)
            for j in range(columns):
                _subtract(slope[j], hessian[i, j], moved)
        _store(level, start, integers)
        if size <= columns:
            for group in range(scales.shape[0]):
                _refit(level, weight, slope, hessian, scale[group], zero[group], group * size, size, dropped)
        for i in range(columns):
            _difference(quantized[i, start : start + rows], weight[i], change[i, start : start + rows])
        _store(weight, start, quantized)
        _store(scale, start, scales)


@_compile
def _move(weight, pull, curvature, scale, zero, top, level, moved):
    step = _F(1) / curvature
    for r in range(weight.shape[0]):
        level[r] = _nearest(weight[r] + pull[r] * step, scale[r], zero[r], top)
        now = (level[r] - zero[r]) * scale[r]
        moved[r] = now - weight[r]
        weight[r] = now


@_compile
def _refit(levels, weight, pull, hessian, scale, zero, start, size, dropped):
    """Give one group its least-squares scales, as `torch_loops.refit`, and tell the weights and pull of the block."""
    product, move = np.empty(scale.shape[0], _F), np.empty(scale.shape[0], _F)
    slope, curvature = np.zeros(scale.shape[0], _F), np.zeros(scale.shape[0], _F)
    for i in range(start, start + size):
        _subtract(levels[i], _F(1), zero)
        product[:] = _ZERO
        for j in range(start, i):  # the Hessian is symmetric: twice what is below the diagonal, and the diagonal
            _subtract(product, _F(-2) * hessian[i, j], levels[j])
        _subtract(product, -hessian[i, i], levels[i])
        _add_product(curvature, levels[i], product)
        _add_product(slope, levels[i], pull[i])
    for r in range(scale.shape[0]):
        curved = max(curvature[r], _LEAST_CURVATURE)
        found = _round_scale(scale[r] + slope[r] / curved, dropped) - scale[r]
        move[r] = found if found * (slope[r] + slope[r] - found * curved) > _ZERO else _ZERO
        scale[r] += move[r]
    for i in range(start, start + size):
        _product(levels[i], scale, weight[i])
        _product(levels[i], move, product)
        for j in range(start + size, pull.shape[0]):  # groups to come; those before are done
            _subtract(pull[j], hessian[i, j], product)


@_compile
def _difference(before, after, target):
    for r in range(target.shape[0]):
        target[r] = before[r] - after[r]


@_compile
def _product(left, right, target):
    for r in range(target.shape[0]):
        target[r] = left[r] * right[r]


@_compile
def _add_product(target, left, right):
    for r in range(target.shape[0]):
        target[r] += left[r] * right[r]


@_compile
def _round_scale(scale, dropped):
    """Do what `round_scales` does: half to even at float32's bit `dropped`, fp16's subnormals apart."""
    size = min(max(abs(scale), _SMALLEST), _LARGEST)
    if dropped != 13 or size >= _SMALLEST_NORMAL:
        bits = np.float32(size).view(np.int32)
        bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        size = np.int32(bits >> dropped << dropped).view(np.float32)
    if size < _SMALLEST_NORMAL:
        size = (size + _SUBNORMAL_STEPS) - _SUBNORMAL_STEPS
    return -size if scale < _ZERO else size
