"""The passes' loops over columns in Triton, in its interpreter, against float64 by definition."""

import pytest
import torch

from qsun.quantization.methods import triton_loops
from qsun.quantization.methods.rounding import round_to_grid
from tests.quantization.methods.test_loops import a_descent, descend_by_definition, grids, matrices, round_by_definition

pytest_plugins = ["tests.kernels.interpreter"]
ROWS = [1, 16, 41]  # a program has 16


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("B", [1, 32, 100, 130])
def test_columns_are_rounded_by_definition(B, N, sym):
    block, factor = matrices((B, N), (B, B))
    kept, factor = block.clone(), torch.triu(factor * 0.05, 1) + torch.eye(B) * 1.25
    scales, zeros = grids(3, N, sym)
    groups = torch.arange(B) % 3
    found = triton_loops.round_columns(block, factor, scales, zeros, groups, 15)
    exact = round_by_definition(block, factor, scales, zeros, groups, 15)
    same = (found[0] == exact[0]).all(0)  # a row may go another way at a rounding boundary
    assert same.float().mean() > 0.9
    assert torch.allclose(found[1][:, same].double(), exact[1][:, same], atol=1e-4)
    assert torch.equal(block, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize(("B", "size"), [(32, 32), (128, 64), (128, 128), (96, 96), (64, 192)])
def test_a_block_descends_by_definition(B, size, N, dtype):
    state, pull, hessian = a_descent(B, size, N, dtype)
    kept, before, scales = pull.clone(), state[1].clone(), state[2].clone()
    exact = descend_by_definition(state, pull, hessian, size, 15, dtype)
    change = triton_loops.descend_columns(state, pull, hessian, size, (15, dtype))
    assert torch.equal(pull, kept)
    assert torch.allclose(change, before - state[1], atol=1e-6)
    same = (state[0] == exact[0]).all(0) & (state[2] == exact[2]).all(0)
    assert same.float().mean() > 0.9
    assert torch.allclose(state[1][:, same].double(), exact[1][:, same], atol=1e-5)
    assert (state[2] != scales).any() == (size <= B)


def test_halves_go_to_even_and_far_weights_to_the_ends():
    block = torch.tensor([[0.5, 1.5, -0.5, 2.5, 1e9, -1e9, 3.4999998, 0.0]])
    found, _ = triton_loops.round_columns(
        block, torch.ones(1, 1), torch.ones(1, 8), torch.full((1, 8), 4.0), torch.zeros(1, dtype=torch.int64), 15
    )
    assert torch.equal(found, round_to_grid(block, torch.ones(1, 8), torch.full((1, 8), 4.0), 15))
