"""The GPU storage of QuantLinear without a GPU: what the Triton kernels are fed, through their plain-torch fallback."""

import pytest
import torch
from torch.nn.functional import silu

from qsun.kernels import packed_cuda
from qsun.runtime.quant_linear import QuantLinear
from tests.kernels.test_int4_cpu import random_weights


@pytest.fixture
def on_gpu(monkeypatch):
    """QuantLinear packs as for a GPU; its products run `_other_dtype`, as float32 inputs do there."""
    monkeypatch.setattr(QuantLinear, "_choose_storage", lambda self, weights: "triton")
    monkeypatch.setattr(packed_cuda, "reserve_workspace", lambda *_: None)

    def product(layer, x, silu_mul=False, residual=None):
        weights = (layer.words, layer.scales, layer.zeros, layer.order, None, layer.bias, residual)
        return packed_cuda.packed_linear(x, *weights, layer.out_features, layer.group_size, layer.bits, silu_mul)

    return product


def close(y, wanted):
    assert (y.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 32, 32), (80, 160, 32), (64, 256, 64), (96, 128, -1)])
@pytest.mark.parametrize("sym", [True, False])
def test_packed_and_unpacked(on_gpu, N, K, group_size, sym):
    weights = random_weights(N, K, group_size, sym)
    layer = QuantLinear(weights, torch.randn(N), 4, torch.bfloat16)
    assert torch.equal(layer.weight_in(torch.float32), weights.dequantize())
    x, residual = torch.randn(2, 3, K), torch.randn(2, 3, N)
    wanted = x.double() @ weights.dequantize(torch.float64).t() + layer.bias.double() + residual.double()
    close(on_gpu(layer, x, residual=residual), wanted)


@pytest.mark.parametrize("sym", [True, False])
def test_gate_and_up_take_turns_and_come_back(on_gpu, sym):
    weights = random_weights(96, 64, 32, sym)
    layer = QuantLinear(weights, None, 4, torch.bfloat16, gated=True)
    assert torch.equal(layer.weight_in(torch.float32), weights.dequantize())
    x = torch.randn(5, 64)
    gate, up = (x.double() @ weights.dequantize(torch.float64).t()).chunk(2, -1)
    close(on_gpu(layer, x, silu_mul=True), silu(gate) * up)


def test_activation_order_and_the_gradient(on_gpu):
    g_idx = (torch.randperm(128) // 32).to(torch.int32)
    weights = random_weights(32, 128, 32)._replace(g_idx=g_idx)
    layer = QuantLinear(weights, None, 4, torch.float16)
    x, grad = torch.randn(3, 128), torch.randn(3, 32)
    close(on_gpu(layer, x), x.double() @ weights.dequantize(torch.float64).t())
    ours = packed_cuda.packed_input_grad(grad, layer.words, layer.scales, layer.zeros, layer.order, None, 128, 32, 4)
    close(ours, grad.double() @ weights.dequantize(torch.float64))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_other_bits(on_gpu, sym, bits):
    weights = random_weights(96, 128, 32, top=2**bits - 1)
    weights = weights._replace(zeros=torch.full_like(weights.zeros, 2 ** (bits - 1)) if sym else weights.zeros)
    layer = QuantLinear(weights, None, bits, torch.bfloat16, gated=True)
    assert (layer.zeros is None) == sym
    assert torch.equal(layer.weight_in(torch.float32), weights.dequantize())
    x = torch.randn(5, 128)
    gate, up = (x.double() @ weights.dequantize(torch.float64).t()).chunk(2, -1)
    close(on_gpu(layer, x, silu_mul=True), silu(gate) * up)


@pytest.mark.parametrize(("bits", "read"), [(2, 32), (3, 48), (4, 64), (8, 128)])
def test_bytes_of_a_product(on_gpu, bits, read):
    """Words of whole tiles and bfloat16 scales, and nothing else."""
    weights = random_weights(64, 256, 128, top=2**bits - 1)
    weights = weights._replace(zeros=torch.full_like(weights.zeros, 2 ** (bits - 1)))
    layer = QuantLinear(weights, None, bits, torch.bfloat16)
    assert layer.read_bytes(1) == 64 * 2 * read + 2 * 2 * 64
