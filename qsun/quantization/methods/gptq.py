"""GPTQ: quantize one column after another and let the columns still to come absorb each error.

Source: Frantar et al., "GPTQ", arXiv 2210.17323, section 3 and its Cholesky formulation. Beyond the paper:

* Activation order with *static groups*: columns are visited by falling Hessian diagonal, but groups stay where they
  are in the file, so no engine needs a g_idx. `desc_act=True` is the classic form, whose groups follow the order.
* The scale search weighs a column's squared error by 1 / U_jj^2, which is what GPTQ's error costs once the later
  columns have absorbed what they can (U: upper Cholesky factor of the inverse Hessian).
* Coordinate descent on the result (coordinate_descent.py): a sweep revisits columns, which GPTQ never does, and
  refits the scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.model.quantized import Quantized
from qsun.quantization.methods.coordinate_descent import descend
from qsun.quantization.methods.grid import Grid, minmax_scales, search_scales
from qsun.quantization.methods.inverse_factor import inverse_factor
from qsun.quantization.methods.loops import loops_on

ScaleSearch = Callable[[Tensor, Grid, Tensor], tuple[Tensor, Tensor]]
_BLOCK = 128  # columns that learn of an error at once; all later ones learn of it in one product


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
    groups = (torch.arange(len(order), device=order.device) // grid.group_size).to(torch.int32)
    g_idx[order] = groups
    return result._replace(q=q, g_idx=None if torch.equal(g_idx, groups) else g_idx)


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
    columns = weight.t().contiguous()
    if options.static_groups:
        scales, zeros = (found.t().contiguous() for found in find(weight, grid, importance))
        q = torch.empty_like(columns)
        q[order] = _quantize_columns(columns[order], factor, scales, zeros, order // (K // len(scales)), grid.top)
    else:
        q, scales, zeros = _quantize_groups(columns, factor, grid, find, importance)
    del factor  # as large as the Hessian
    hessian.diagonal().add_(damp)
    if options.sweeps:
        q, scales = descend(columns, q, scales, zeros, hessian, grid, options.sweeps)
    return Quantized(q.t().to(torch.uint8).contiguous(), scales, zeros.to(torch.uint8))


def _quantize_columns(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
) -> Tensor:
    """Sweep over columns whose scales and zeros, (G, N), are known. weight: (K, N). Returns (K, N) float integers."""
    weight, q = weight.clone(), torch.empty_like(weight)
    for start in range(0, len(weight), _BLOCK):
        columns = slice(start, start + _BLOCK)
        q[columns] = _quantize_block(weight, factor, scales, zeros, groups[columns], columns, top)
    return q


def _quantize_groups(
    weight: Tensor, factor: Tensor, grid: Grid, find: ScaleSearch, importance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep, finding each group's scale when it is reached, from weights that already absorbed earlier errors."""
    weight, q = weight.clone(), torch.empty_like(weight)
    size, found = len(weight) // grid.groups(len(weight)), []
    one_group = Grid(grid.bits, -1, grid.sym, grid.scale_dtype)
    for start in range(0, len(weight), size):
        columns = slice(start, start + size)
        scale, zero = (t.t().contiguous() for t in find(weight[columns].t(), one_group, importance[columns]))
        found.append((scale, zero))
        groups = torch.zeros(size, dtype=torch.int64, device=weight.device)
        q[columns] = _quantize_block(weight, factor, scale, zero, groups, columns, grid.top)
    return q, torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])


def _quantize_block(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, columns: slice, top: int
) -> Tensor:
    """Return the integers of some columns, and take their errors out of all later columns of `weight`."""
    local = factor[columns, columns].contiguous()
    integers, errors = loops_on(weight.device).round_columns(weight[columns], local, scales, zeros, groups, top)
    weight[columns.stop :].addmm_(factor[columns, columns.stop :].t(), errors, alpha=-1)
    return integers
