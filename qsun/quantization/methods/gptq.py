"""GPTQ: quantize one column after another and let the columns still to come absorb each error.

Source: Frantar et al., "GPTQ", arXiv 2210.17323, section 3 and its Cholesky formulation. Beyond the paper:

* Activation order with *static groups*: columns are visited by falling Hessian diagonal, but groups stay where they
  are in the file, so no engine needs a g_idx. `desc_act=True` is the classic form, whose groups follow the order.
* The scale search weighs a column's squared error by 1 / U_jj^2, which is what GPTQ's error costs once the later
  columns have absorbed what they can (U: upper Cholesky factor of the inverse Hessian).
* Coordinate descent on the result (coordinate_descent.py): a sweep revisits columns, which GPTQ never does, and
  refits the scales.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.errors import QsunError
from qsun.model.quantized import Quantized
from qsun.quantization.methods.coordinate_descent import descend
from qsun.quantization.methods.grid import Grid, minmax_scales, round_to_grid, search_scales

log = logging.getLogger(__name__)
ScaleSearch = Callable[[Tensor, Grid, Tensor], tuple[Tensor, Tensor]]
_BLOCK, _INNER = 128, 32  # an error goes to the next _INNER columns at once, to the _BLOCK and the rest in bulk
_FLOAT64_UP_TO = 4096  # factor larger Hessians in float32: float64 would need gigabytes


@dataclass(frozen=True)
class GptqOptions:
    """What can be varied in GPTQ; see the module's docstring and QuantConfig."""

    damp_percent: float = 0.01
    desc_act: bool = False
    static_groups: bool = True
    scale_search: bool = True
    sweeps: int = 1


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, options: GptqOptions | None = None) -> Quantized:
    """Quantize a weight matrix to minimise ``trace((W - Q) H (W - Q)^T)``.

    Args:
        weight: (N, K) float.
        hessian: (K, K) float32, the mean of x x^T over calibration tokens.
        grid: group_size must divide K.
    Returns:
        Quantized, with a g_idx only where desc_act needs one.
    Raises:
        QsunError: the Hessian has NaN or Inf.
    """
    options = options or GptqOptions()
    weight, hessian = weight.float().clone(), hessian.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    visit_by_importance = options.desc_act or options.static_groups
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if visit_by_importance else None
    if options.desc_act and order is not None and grid.group_size != -1:
        return _with_groups_in_order(weight, hessian, order, grid, options)
    return _gptq_contiguous(weight, hessian, order, grid, options)


def _with_groups_in_order(
    weight: Tensor, hessian: Tensor, order: Tensor, grid: Grid, options: GptqOptions
) -> Quantized:
    """Permute, quantize contiguous groups, and put the integers back with a g_idx (desc_act)."""
    result = _gptq_contiguous(weight[:, order], hessian[order][:, order], None, grid, options)
    q, g_idx = torch.empty_like(result.q), torch.empty_like(order, dtype=torch.int32)
    q[:, order] = result.q
    g_idx[order] = (torch.arange(len(order), device=order.device) // grid.group_size).to(torch.int32)
    return result._replace(q=q, g_idx=g_idx)


def _gptq_contiguous(
    weight: Tensor, hessian: Tensor, order: Tensor | None, grid: Grid, options: GptqOptions
) -> Quantized:
    K = weight.shape[1]
    factor, damp = inverse_factor(hessian if order is None else hessian[order][:, order], options.damp_percent)
    cost = factor.diagonal().square().reciprocal()
    if order is None:
        importance, order = cost, torch.arange(K, device=weight.device)
    else:
        importance = torch.empty_like(cost)
        importance[order] = cost
    find: ScaleSearch = search_scales if options.scale_search else lambda w, g, _: minmax_scales(w, g)
    scales, zeros = find(weight, grid, importance)
    groups = order // (K // scales.shape[1])
    if options.static_groups:
        q = _quantize_columns(weight[:, order], factor, scales[:, groups], zeros[:, groups], grid)
        q = torch.empty_like(q).index_copy_(1, order, q)
    else:
        q, scales, zeros = _quantize_groups(weight, factor, grid, find, importance)
    del factor  # as large as the Hessian
    hessian.diagonal().add_(damp)
    if options.sweeps:
        q, scales = descend(weight, q, scales, zeros, hessian, grid, options.sweeps)
    return Quantized(q.to(torch.uint8), scales.t().contiguous(), zeros.t().to(torch.uint8).contiguous())


def _quantize_columns(weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """Sweep over columns whose (N, K) scales and zeros are known. Returns (N, K) float integers."""
    weight, q = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        _quantize_block(weight, q, factor, scales, zeros, slice(start, min(start + _BLOCK, weight.shape[1])), grid.top)
    return q


def _quantize_groups(
    weight: Tensor, factor: Tensor, grid: Grid, find: ScaleSearch, importance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep, finding each group's scale when it is reached, from weights that already absorbed earlier errors."""
    weight, q = weight.clone(), torch.empty_like(weight)
    size = weight.shape[1] // grid.groups(weight.shape[1])
    found = []
    for start in range(0, weight.shape[1], size):
        columns = slice(start, start + size)
        one_group = Grid(grid.bits, -1, grid.sym, grid.scale_dtype)
        scale, zero = find(weight[:, columns], one_group, importance[columns])
        found.append((scale, zero))
        scales, zeros = (t.expand(-1, weight.shape[1]) for t in (scale, zero))
        _quantize_block(weight, q, factor, scales, zeros, columns, grid.top)
    return q, torch.cat([s for s, _ in found], 1), torch.cat([z for _, z in found], 1)


def _quantize_block(
    weight: Tensor, q: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, columns: slice, top: int
) -> None:
    """Quantize some columns in place in `q`, and take their errors out of all later columns of `weight`."""
    # Transposed, a column is one run of memory; cloned, because of a single row contiguous() would be the caller's own.
    block, local = weight[:, columns].t().clone(memory_format=torch.contiguous_format), factor[columns, columns]
    scale, zero = scales[:, columns].t().contiguous(), zeros[:, columns].t().contiguous()
    errors, integers = torch.empty_like(block), torch.empty_like(block)
    for start in range(0, len(block), _INNER):
        stop = min(start + _INNER, len(block))
        for i in range(start, stop):
            integers[i] = round_to_grid(block[i], scale[i], zero[i], top)
            errors[i] = (block[i] - (integers[i] - zero[i]) * scale[i]) / local[i, i]
            block[i + 1 : stop].addr_(local[i, i + 1 : stop], errors[i], alpha=-1)
        block[stop:].addmm_(local[start:stop, stop:].t(), errors[start:stop], alpha=-1)
    q[:, columns] = integers.t()
    weight[:, columns.stop :].addmm_(errors.t(), factor[columns, columns.stop :], alpha=-1)


def inverse_factor(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Return the upper Cholesky factor U of the damped inverse Hessian, U^T U = (H + damp I)^-1, and the damp.

    A Hessian that is singular at `damp_percent` of its mean diagonal is damped ten times more until it factors.
    """
    if not torch.isfinite(hessian).all():
        raise QsunError("the calibration statistics have NaN or Inf; check the model's weights and dtype")
    dtype = torch.float64 if hessian.shape[0] <= _FLOAT64_UP_TO else torch.float32
    mean = hessian.diagonal().mean().item()
    while True:
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(damp_percent * mean)
        # Each of these is as large as the Hessian, hundreds of megabytes: none is kept longer than it is needed.
        damped, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            damped = torch.cholesky_inverse(damped)
            damped, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not failed:
            return damped.float(), damp_percent * mean
        damp_percent = max(damp_percent * 10, 1e-4)
        log.warning("singular Hessian of size %d: damping raised to %g", hessian.shape[0], damp_percent)
