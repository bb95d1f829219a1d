"""AWQ's two searches against what they must improve."""

import pytest
import torch

from qsun.quantization.methods.awq import awq, channel_scales, clipped_scales
from qsun.quantization.methods.grid import Grid, minmax_scales
from qsun.quantization.methods.rtn import quantize_nearest, rtn


@pytest.fixture
def layer():
    """Two layers that share inputs of which a few channels are twenty times as active."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 128, generator=g)
    x[:, ::17] *= 20
    return [torch.randn(24, 128, generator=g), torch.randn(40, 128, generator=g)], x


def loss(weight, quantized, x):
    return float((x.double() @ (weight - quantized).double().t()).square().sum())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_channel_scales_lower_the_output_error(layer, group_size, sym):
    weights, x = layer
    grid = Grid(3, group_size, sym)
    scales = channel_scales(weights, x.t() @ x / len(x), x.abs().mean(0), grid)
    assert scales[::17].mean() > 2 * scales.median()
    before = sum(loss(w, rtn(w, grid, scale_search=False).dequantize(), x) for w in weights)
    after = sum(
        loss(w, quantize_nearest(w * scales, *minmax_scales(w * scales, grid), grid).dequantize() / scales, x)
        for w in weights
    )
    assert after < 0.7 * before


def test_even_activity_needs_no_scaling_that_hurts(layer):
    weights, _ = layer
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))
    grid = Grid(4, 32, False)
    scales = channel_scales(weights, x.t() @ x / len(x), x.abs().mean(0), grid)
    plain = loss(weights[0], rtn(weights[0], grid, scale_search=False).dequantize(), x)
    scaled = weights[0] * scales
    assert loss(weights[0], quantize_nearest(scaled, *minmax_scales(scaled, grid), grid).dequantize() / scales, x) < (
        1.02 * plain
    )


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_clipping_lowers_each_groups_output_error(layer, group_size, sym):
    weights, _ = layer
    weight = weights[0].clone()
    weight[:, 3] *= 6
    hessian = torch.eye(128)
    grid = Grid(3, group_size, sym)
    clipped = awq(weight, hessian, grid).dequantize()
    plain = rtn(weight, grid, scale_search=False).dequantize()
    size = 128 if group_size == -1 else group_size
    per_group = [(w - weight).square().reshape(24, -1, size).sum(-1) for w in (clipped, plain)]
    assert (per_group[0] <= per_group[1] + 1e-6).all()
    assert per_group[0].sum() < 0.95 * per_group[1].sum()


def test_clipping_uses_the_whole_hessian_of_a_group(layer):
    """Brute force over the same shrinks, with explicit inputs, one row and one group at a time."""
    weights, x = layer
    weight, grid = weights[0][:5], Grid(3, 64, True)
    scales, _ = clipped_scales(weight, x.t() @ x / len(x), grid)
    for row in range(5):
        for group in range(2):
            columns = slice(64 * group, 64 * group + 64)
            piece, one = weight[row : row + 1, columns], Grid(3, -1, True)
            tried = {}
            for step in range(10):
                found = minmax_scales(piece, one, 1 - 0.05 * step)
                error = loss(piece, quantize_nearest(piece, *found, one).dequantize(), x[:, columns])
                tried[float(found[0])] = error
            assert tried[float(scales[row, group])] <= min(tried.values()) * 1.001
