"""Grids: what scales and zero points may be, against brute force."""

import pytest
import torch

from qsun.quantization.methods.grid import Grid, minmax_scales, search_scales
from qsun.quantization.methods.rounding import round_scales, round_to_grid
from qsun.quantization.methods.rtn import rtn


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_every_format_can_hold_the_result(bits, sym, scale):
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(bits)) * scale
    found = rtn(weight, Grid(bits, 32, sym))
    assert found.q.dtype == torch.uint8
    assert found.q.max() <= 2**bits - 1
    assert found.zeros.min() >= 1  # GPTQ v1 stores zero - 1
    assert found.zeros.max() <= 2**bits - 1
    assert torch.equal(found.scales, found.scales.half().float())
    assert found.scales.abs().min() > 0
    if sym:
        assert (found.zeros == 2 ** (bits - 1)).all()


def test_bfloat16_scales_survive_both_dtypes():
    scales = torch.rand(1000) * 0.1 + 1e-4
    rounded = round_scales(scales, torch.bfloat16)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert torch.equal(rounded, rounded.half().float())


@pytest.mark.parametrize("weight", [torch.zeros(3, 64), torch.full((3, 64), 0.7), torch.full((3, 64), -0.7)])
def test_constant_groups(weight):
    for sym in (True, False):
        assert torch.allclose(rtn(weight, Grid(4, 32, sym)).dequantize(), weight, rtol=0.07, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("sym", [True, False])
def test_search_is_close_to_brute_force(bits, sym):
    """400 scales of either sign and every zero point, in float64."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(6, 32, generator=generator)
    importance = torch.rand(32, generator=generator)
    grid = Grid(bits, 32, sym)
    scales, zeros = search_scales(weight, grid, importance)
    error = _loss(weight, scales, zeros, grid, importance)
    best = torch.full((6,), float("inf"), dtype=torch.float64)
    reach = weight.abs().max()
    for scale in torch.linspace(0.02, 1.2, 400) * reach:
        for zero in [grid.middle] if sym else range(1, grid.top + 1):
            for sign in (1, -1):
                tried = _loss(
                    weight, torch.full((6, 1), sign * float(scale)), torch.full((6, 1), float(zero)), grid, importance
                )
                best = torch.minimum(best, tried)
    assert (error <= best * 1.12).all()


def _loss(weight, scales, zeros, grid, importance):
    weight, scales, zeros = weight.double(), scales.double(), zeros.double()
    wrong = (round_to_grid(weight, scales, zeros, grid.top) - zeros) * scales - weight
    return (wrong.square() * importance).sum(1)


def test_symmetric_grid_turns_its_long_arm_to_the_large_weight():
    weight = torch.tensor([[1.0, -0.5, 0.5, 0.0] * 8])
    assert search_scales(weight, Grid(2, 32, True))[0].item() < 0
    assert torch.allclose(rtn(weight, Grid(2, 32, True)).dequantize(), weight, rtol=0.02)


def test_plain_grid_covers_the_range():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for sym in (True, False):
        grid = Grid(4, 64, sym)
        scales, _ = minmax_scales(weight, grid)
        worst = (rtn(weight, grid, scale_search=False).dequantize() - weight).abs().amax(1)
        assert (worst <= 0.51 * scales[:, 0] + 1e-6).all()


def test_one_row_and_chunked_rows_agree():
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(2))
    grid = Grid(4, 32, False)
    scales, zeros = search_scales(weight, grid)
    for row in (0, 4095, 4096, 4999):
        one = search_scales(weight[row : row + 1], grid)
        assert torch.equal(one[0], scales[row : row + 1])
        assert torch.equal(one[1], zeros[row : row + 1])
