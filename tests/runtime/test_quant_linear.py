"""QuantLinear against float64, and its gradient."""

import pytest
import torch

import qsun
from qsun.kernels.reference import dequantize, group_index
from qsun.model.quantized import Quantized


def parts(N, K, group_size, bits=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    G = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, 2**bits, (N, K), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (G, N), generator=g)
    return q, torch.rand(G, N, generator=g) * 0.1 + 0.01, zeros


def layer_of(q, scales, zeros, bias=None, dtype=torch.float32):
    """A layer of the fewest bits that hold its integers, with scales that are rounded to the dtype."""
    top = max(int(q.max()), int(zeros.max()))
    bits = next(bits for bits in (2, 3, 4, 8) if top < 1 << bits)
    return qsun.QuantLinear(Quantized(q, scales.to(dtype).float(), zeros.to(torch.uint8)), bias, bits, dtype)


def dense(q, scales, zeros):
    """Element by element, in Python floats."""
    N, K = q.shape
    size = K // scales.shape[0]
    return torch.tensor(
        [[(int(q[n, k]) - int(zeros[k // size, n])) * float(scales[k // size, n]) for k in range(K)] for n in range(N)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("N", "K", "group_size"), [(1, 32, 32), (5, 96, 32), (7, 128, -1), (16, 256, 128)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reference_and_layer_equal_the_definition(N, K, group_size, bits):
    q, scales, zeros = parts(N, K, group_size, bits)
    weight = dense(q, scales, zeros)
    assert torch.equal(dequantize(q, scales, zeros, None, torch.float64), weight)
    assert torch.equal(dequantize(q, scales, zeros, group_index(K, len(scales)), torch.float64), weight)
    x = torch.randn(3, 2, K, dtype=torch.float64)
    layer = layer_of(q, scales, zeros)
    assert torch.allclose(layer(x.float()).double(), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_bias(dtype):
    q, scales, zeros = parts(24, 64, 32)
    bias = torch.randn(24)
    layer = layer_of(q, scales, zeros, bias, dtype)
    x = torch.randn(5, 64).to(dtype)
    wanted = x.double() @ dense(q, scales.to(dtype), zeros).t() + bias.to(dtype).double()
    assert layer(x).dtype == dtype
    assert (layer(x).double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()


def test_gradient_with_respect_to_the_input():
    q, scales, zeros = parts(12, 64, 32)
    layer = layer_of(q, scales, zeros, torch.randn(12))
    x = torch.randn(2, 3, 64, requires_grad=True)
    direction = torch.randn(2, 3, 12)
    (layer(x) * direction).sum().backward()
    assert torch.allclose(x.grad.double(), direction.double() @ dense(q, scales, zeros), rtol=1e-4, atol=1e-4)
    assert not list(layer.parameters())


def test_activation_ordered_groups():
    q, scales, zeros = parts(8, 64, 32)
    g_idx = torch.randperm(64) // 32
    weight = dequantize(q, scales, zeros, g_idx, torch.float64)
    for k in range(64):
        group = int(g_idx[k])
        assert torch.allclose(weight[:, k], (q[:, k].double() - zeros[group]) * scales[group].double())


def test_moving_to_another_dtype_keeps_scales():
    q, scales, zeros = parts(8, 64, 32)
    layer = layer_of(q, scales, zeros, torch.randn(8))
    moved = layer.to(torch.bfloat16)
    assert torch.equal(moved.scales, scales)
    assert moved.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(("largest", "bits"), [(3, 2), (4, 3), (7, 3), (8, 4), (15, 4), (16, 8), (255, 8)])
@pytest.mark.parametrize("where", ["q", "zeros"])
def test_the_fewest_bits_that_hold_the_parts(where, largest, bits):
    q, scales, zeros = parts(8, 64, 32, 2)
    {"q": q, "zeros": zeros}[where][0, 0] = largest
    layer = layer_of(q, scales, zeros)
    assert layer.bits == bits
    assert torch.equal(layer.quantized().q, q) and torch.equal(layer.quantized().zeros.long(), zeros)


def test_the_product_plus_a_residual():
    q, scales, zeros = parts(8, 64, 32)
    layer = layer_of(q, scales, zeros, torch.randn(8))
    x, residual = torch.randn(3, 64), torch.randn(3, 8)
    assert torch.equal(layer.plus(x, residual), residual + layer(x))
