"""Both kinds of loops against float64 by definition, on edge-case shapes, and what chooses between them."""

import sys

import pytest
import torch

from qsun.quantization.methods import torch_loops
from qsun.quantization.methods.gptq import GptqOptions, gptq
from qsun.quantization.methods.grid import Grid
from qsun.quantization.methods.loops import _compiled, loops_on
from qsun.quantization.methods.rounding import round_scales, round_to_grid

CPU = torch.device("cpu")
ROWS = [1, 257]  # tiles have 256 rows


def matrices(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def grids(G, N, sym=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scales = round_scales((torch.rand(G, N, generator=generator) + 0.2) * 0.3, torch.float16)
    if sym:
        return scales * torch.where(torch.rand(G, N, generator=generator) < 0.5, -1.0, 1.0), torch.full((G, N), 8.0)
    return scales, torch.randint(1, 16, (G, N), generator=generator).float()


def test_the_right_loops_are_chosen(chosen_loops):
    assert loops_on(CPU).__name__.endswith(f"{chosen_loops}_loops")
    assert loops_on(torch.device("meta")) is torch_loops


def test_a_gpu_has_loops_in_triton(pretend_cuda):
    assert loops_on(torch.device("cuda", 0)).__name__.endswith("triton_loops")


def test_a_group_as_wide_as_a_row_takes_several_launches_on_a_gpu(pretend_cuda):
    """One of 4096 columns would take as many registers for each row."""
    (weight, x) = matrices((24, 320), (400, 320))
    options = GptqOptions(static_groups=False, scale_search=False, sweeps=0)
    grid, hessian = Grid(4, -1, True), x.t() @ x / 400
    found = gptq(weight.to("cuda"), hessian.to("cuda"), grid, options)
    widths = [(len(launch["args"][0]), launch["B"]) for launch in pretend_cuda.launches[1:]]  # after a first try
    assert widths == [(128, 128), (128, 128), (64, 64)]
    assert torch.equal(found.q.cpu(), gptq(weight, hessian, grid, options).q)


def without(package, loops, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    monkeypatch.delitem(sys.modules, f"qsun.quantization.methods.{loops}", raising=False)
    monkeypatch.delattr(f"qsun.quantization.methods.{loops}", raising=False)


def test_without_numba_torch_does_it(monkeypatch):
    without("numba", "compiled_loops", monkeypatch)
    assert _compiled.__wrapped__() is None


@pytest.mark.parametrize("missing", ["Triton", "C compiler"])
def test_without_triton_or_a_c_compiler_a_gpu_quantizes_in_torch(missing, pretend_cuda, monkeypatch, caplog):
    def compile_it(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    if missing == "Triton":
        without("triton", "triton_loops", monkeypatch)
    else:
        monkeypatch.setattr("qsun.quantization.methods.triton_loops._launch", compile_it)
    for _ in range(2):
        assert loops_on(torch.device("cuda", 0)) is torch_loops
    (warning,) = caplog.messages
    assert "passes on cuda:0 loop over columns in torch" in warning
    assert ("halted; None in sys.modules" if missing == "Triton" else "Failed to find C compiler.") in warning
    assert "\n" not in warning


@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize(("K", "G"), [(32, 1), (96, 3), (160, 1)])
def test_least_error_is_the_least(N, K, G):
    (weight,) = matrices((N, K))
    scales, zeros = (torch.stack(t) for t in zip(*(grids(N, G, False, seed) for seed in range(5)), strict=True))
    importance = torch.rand(K, generator=torch.Generator().manual_seed(2))
    found = loops_on(CPU).least_error(weight, scales, zeros, importance, 15)
    scales, zeros = (t.double().repeat_interleave(K // G, 2) for t in (scales, zeros))
    error = ((round_to_grid(weight.double(), scales, zeros, 15) - zeros) * scales - weight.double()).square()
    error = (error * importance.double()).reshape(5, N, G, -1).sum(-1)
    chosen = error.gather(0, found[None])[0]
    assert (chosen <= error.amin(0) * (1 + 1e-5)).all()


def test_the_first_of_equal_candidates_wins():
    (weight,) = matrices((3, 32))
    scales, zeros = grids(3, 1)
    found = loops_on(CPU).least_error(weight, scales.expand(4, 3, 1), zeros.expand(4, 3, 1), torch.ones(32), 15)
    assert not found.any()


def round_by_definition(block, factor, scales, zeros, groups, top):
    block, factor = block.double().clone(), factor.double()
    integers, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(len(block)):
        scale, zero = scales[groups[i]].double(), zeros[groups[i]].double()
        integers[i] = round_to_grid(block[i], scale, zero, top)
        errors[i] = (block[i] - (integers[i] - zero) * scale) / factor[i, i]
        block[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return integers, errors


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("B", [1, 32, 100, 128])
def test_columns_are_rounded_by_definition(B, N, sym):
    block, factor = matrices((B, N), (B, B))
    kept, factor = block.clone(), torch.triu(factor * 0.05, 1) + torch.eye(B)
    scales, zeros = grids(3, N, sym)
    groups = torch.arange(B) % 3  # static groups in activation order are not contiguous
    found = loops_on(CPU).round_columns(block, factor, scales, zeros, groups, 15)
    exact = round_by_definition(block, factor, scales, zeros, groups, 15)
    same = (found[0] == exact[0]).all(0)  # a row may go another way at a rounding boundary
    assert same.float().mean() > 0.97
    assert torch.allclose(found[1][:, same].double(), exact[1][:, same], atol=1e-4)
    assert torch.equal(block, kept)


def descend_by_definition(state, pull, hessian, size, top, dtype):
    integers, quantized, scales, zeros = (t.double().clone() for t in state)
    pull, hessian = pull.double().clone(), hessian.double()
    for i in range(len(pull)):
        scale, zero = scales[i // size], zeros[i // size]
        integers[i] = round_to_grid(quantized[i] + pull[i] / hessian[i, i], scale, zero, top)
        move = (integers[i] - zero) * scale - quantized[i]
        quantized[i] += move
        pull -= hessian[:, i : i + 1] * move
    for group in range(len(scales) if size <= len(pull) else 0):
        here = slice(group * size, (group + 1) * size)
        levels, local = integers[here] - zeros[group], hessian[here, here]
        slope, curvature = (levels * pull[here]).sum(0), (levels * (local @ levels)).sum(0).clamp(min=1e-12)
        move = round_scales((scales[group] + slope / curvature).float(), dtype).double() - scales[group]
        move[move * (2 * slope - move * curvature) <= 0] = 0
        scales[group] += move
        quantized[here] += levels * move
        pull -= hessian[:, here] @ (levels * move)
    return integers, quantized, scales


def a_descent(B, size, N, dtype):
    """The state of a block after rounding to nearest, its pull, and its Hessian."""
    target, x = matrices((B, N), (4 * B, B))
    hessian = x.t() @ x / len(x)
    scales, zeros = grids(max(1, B // size), N, False)
    scales = round_scales(scales, dtype)
    each = [t.repeat_interleave(min(B, size), 0) for t in (scales, zeros)]
    integers = round_to_grid(target, *each, 15)
    state = (integers, (integers - each[1]) * each[0], scales, zeros)
    return state, hessian @ (target - state[1]), hessian


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize(("B", "size"), [(32, 32), (128, 32), (128, 64), (128, 128), (96, 96), (64, 192)])
def test_a_block_descends_by_definition(B, size, N, dtype):
    state, pull, hessian = a_descent(B, size, N, dtype)
    exact = descend_by_definition(state, pull, hessian, size, 15, dtype)
    before, scales = state[1].clone(), state[2].clone()
    change = loops_on(CPU).descend_columns(state, pull, hessian, size, (15, dtype))
    assert torch.allclose(change, before - state[1], atol=1e-6)
    same = (state[0] == exact[0]).all(0) & (state[2] == exact[2]).all(0)
    assert same.float().mean() > 0.95
    assert torch.allclose(state[1][:, same].double(), exact[1][:, same], atol=1e-5)
    assert (state[2] != scales).any() == (size <= B)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_scales_are_rounded_as_in_torch(dtype):
    compiled = pytest.importorskip("qsun.quantization.methods.compiled_loops")
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(4000, generator=generator) * 10 ** torch.empty(4000).uniform_(-9, 6, generator=generator)
    halves = (torch.arange(200) * 2 + 1) * 2.0**-25  # ties, among them fp16's subnormals
    scales = torch.cat([scales, halves, -halves, 1 + halves * 2**13, torch.tensor([0.0, -0.0, 65519.0, 2**-14, 1e-30])])
    ours = [float(compiled._round_scale(s, compiled._DROPPED_BITS[dtype])) for s in scales.numpy()]
    assert torch.equal(torch.tensor(ours), round_scales(scales, dtype))
