"""GPTQ and coordinate descent against an independent float64 reference written column by column."""

import itertools
import logging

import pytest
import torch

from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid, search_scales
from qsun.quantization.methods.inverse_factor import inverse_factor
from qsun.quantization.methods.rounding import round_to_grid
from qsun.quantization.methods.rtn import rtn

PLAIN = GptqOptions(scale_search=False, sweeps=0, static_groups=False)


def problem(N, K, rows=None, seed=0, correlated=True):
    """Random weights, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    x = torch.randn(rows or 4 * K, K, generator=generator)
    if correlated:
        x = x @ torch.randn(K, K, generator=generator) / K**0.5 * torch.rand(K, generator=generator).exp()
    return weight, x.t() @ x / len(x)


def output_loss(weight, quantized, hessian):
    difference = (weight - quantized.dequantize(torch.float64)).double()
    return float(((difference @ hessian.double()) * difference).sum())


def gptq_float64(weight, hessian, grid, damp):
    """GPTQ by its definition: solve for the optimal update of the remaining columns afresh at every column."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    K = weight.shape[1]
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    size = K if grid.group_size == -1 else grid.group_size
    result = torch.empty_like(weight)
    for j in range(K):
        if j % size == 0:
            one = Grid(grid.bits, -1, grid.sym)
            scales, zeros = plain_scales(weight[:, j : j + size].float(), one)
        level = round_to_grid(weight[:, j], scales.double(), zeros.double(), grid.top)
        result[:, j] = (level - zeros) * scales
        inverse = torch.linalg.inv(hessian[j:, j:])  # of the columns not yet fixed
        step = (weight[:, j] - result[:, j]) / inverse[0, 0]
        weight[:, j:] -= step[:, None] * inverse[0]
    return result


def plain_scales(weight, grid):
    from qsun.quantization.methods.grid import minmax_scales

    scales, zeros = minmax_scales(weight, grid)
    return scales[:, 0], zeros[:, 0]


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_definition(bits, sym, group_size):
    weight, hessian = problem(5, 160)
    grid = Grid(bits, group_size, sym)
    ours = gptq(weight, hessian, grid, PLAIN).dequantize(torch.float64)
    theirs = gptq_float64(weight, hessian, grid, 0.01)
    # float32 against float64: now and then a value lands on the other side of a rounding boundary
    assert (ours - theirs).abs().lt(1e-5).float().mean() > 0.97


@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(1, 32, 32), (7, 96, 32), (16, 128, 128), (3, 192, 64), (8, 384, -1)]
)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_step_lowers_the_output_error(N, K, group_size, sym, bits):
    weight, hessian = problem(N, K, seed=K + bits)
    grid = Grid(bits, group_size, sym)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)  # what both really minimise
    losses = [
        output_loss(weight, quantized, damped)
        for quantized in (
            rtn(weight, grid),
            gptq(weight, hessian, grid, GptqOptions(sweeps=0)),
            gptq(weight, hessian, grid, GptqOptions(sweeps=3)),
        )
    ]
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * 1.0001


def test_descent_ends_where_no_single_change_helps():
    weight, hessian = problem(4, 32, seed=3)
    grid = Grid(3, 32, False)
    found = gptq(weight, hessian, grid, GptqOptions(sweeps=30, damp_percent=1e-6))
    best = output_loss(weight, found, hessian)
    for row, column, change in itertools.product(range(4), range(32), (-1, 1)):
        q = found.q.clone().int()
        q[row, column] += change
        if 0 <= q[row, column] <= 7:
            assert output_loss(weight, found._replace(q=q.to(torch.uint8)), hessian) >= best - 1e-5


def test_desc_act_says_where_its_groups_are():
    weight, hessian = problem(8, 128, seed=5)
    found = gptq(weight, hessian, Grid(4, 32, True), GptqOptions(desc_act=True))
    order = hessian.diagonal().argsort(descending=True)
    assert found.g_idx[order].tolist() == [k // 32 for k in range(128)]
    assert output_loss(weight, found, hessian) < output_loss(weight, rtn(weight, Grid(4, 32, True)), hessian)


@pytest.mark.parametrize("group_size", [-1, 128])
def test_desc_act_of_one_group_needs_no_index(group_size):
    weight, hessian = problem(8, 128, seed=5)
    assert gptq(weight, hessian, Grid(4, group_size, True), GptqOptions(desc_act=True)).g_idx is None


def test_desc_act_of_groups_that_lie_in_order_needs_no_index():
    """A file always has a g_idx; one that says nothing is read as none, and the two must agree."""
    weight, hessian = problem(8, 128, seed=5)
    scale = torch.arange(128, 0, -1).float()
    hessian = hessian / hessian.diagonal().outer(hessian.diagonal()).sqrt() * scale.outer(scale)
    assert gptq(weight, hessian, Grid(4, 32, True), GptqOptions(desc_act=True)).g_idx is None


def test_dead_columns_become_zero():
    weight, hessian = problem(6, 64)
    hessian[5] = hessian[:, 5] = 0
    found = gptq(weight, hessian, Grid(4, 32, False), GptqOptions()).dequantize()
    assert found[:, 5].abs().max() == 0
    assert torch.isfinite(found).all()


def test_singular_hessian_is_damped_more_and_says_so(caplog):
    weight, hessian = problem(6, 64, rows=3)
    hessian -= 0.02 * hessian.diagonal().mean() * torch.eye(64)  # indefinite: 1% is not enough
    with caplog.at_level(logging.WARNING):
        found = gptq(weight, hessian, Grid(4, 32, True), GptqOptions())
    assert "damping raised to 0.1" in caplog.text
    assert torch.isfinite(found.dequantize()).all()


@pytest.mark.parametrize("damping", [0.01, 1e-5])
def test_inverse_factor(damping):
    _, hessian = problem(1, 48)
    upper, damp = inverse_factor(hessian, damping)
    damped = hessian.double() + damp * torch.eye(48, dtype=torch.float64)
    assert torch.allclose(upper.double().t() @ upper.double() @ damped, torch.eye(48, dtype=torch.float64), atol=1e-4)


def test_nan_statistics_are_refused():
    weight, hessian = problem(6, 64)
    hessian[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq(weight, hessian, Grid(4, 32, True))


def test_scale_search_beats_minimum_and_maximum_on_weighted_error():
    weight, _ = problem(16, 128, seed=9)
    weight[:, 7] *= 8  # outliers in a column that hardly matters
    importance = torch.ones(128)
    importance[7] = 1e-3
    grid = Grid(3, 64, True)

    def loss(scales, zeros):
        wide = scales.repeat_interleave(64, 1), zeros.repeat_interleave(64, 1)
        error = (round_to_grid(weight, *wide, grid.top) - wide[1]) * wide[0] - weight
        return float((error.square() * importance).sum())

    from qsun.quantization.methods.grid import minmax_scales

    assert loss(*search_scales(weight, grid, importance)) < 0.5 * loss(*minmax_scales(weight, grid))
