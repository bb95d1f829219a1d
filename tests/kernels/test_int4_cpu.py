"""torch's CPU int4 op behind our own layout knowledge, against float64; also held to lesser instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

from qsun.kernels import int4pack_cpu
from qsun.model.quantized import Quantized
from qsun.runtime.quant_linear import QuantLinear
from tests.places import ROOT

fast_cpu = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch's int4 op is scalar on this CPU"
)
SHAPES = [(16, 32, 32), (48, 96, 32), (64, 256, 128), (80, 192, 64), (112, 128, -1), (208, 96, -1), (144, 512, 256)]


def random_weights(N, K, group_size, sym=False, top=15):
    G = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, top + 1, (N, K), dtype=torch.uint8)
    signs = torch.where(torch.rand(G, N) < 0.5, -1.0, 1.0)
    scales = ((torch.rand(G, N) * 0.1 + 0.01) * signs).bfloat16().float()
    zeros = torch.full((G, N), 8, dtype=torch.uint8) if sym else torch.randint(0, 16, (G, N), dtype=torch.uint8)
    return Quantized(q, scales, zeros)


def assert_close(y, x, weights, bias=None):
    """bfloat16 throughout, sums in float32; torch's op also rounds (8 - zero) * scale, up to 8 steps."""
    wanted = x.double() @ weights.dequantize(torch.float64).t()
    steps = Quantized(torch.ones_like(weights.q), weights.scales.abs(), torch.zeros_like(weights.zeros), weights.g_idx)
    slack = x.double().abs() @ (weights.dequantize(torch.float64).abs() + 4 * steps.dequantize(torch.float64)).t()
    if bias is not None:
        wanted = wanted + bias.double()
    assert y.dtype == x.dtype
    limit = torch.finfo(x.dtype).eps * (slack + wanted.abs()) if x.dtype != torch.float32 else 1e-5 * slack
    assert ((y.double() - wanted).abs() <= limit + 1e-6).all()


@fast_cpu
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_unpack_gives_back_what_was_packed(N, K, group_size):
    weights = random_weights(N, K, group_size)
    q, scales, zeros = int4pack_cpu.unpack(*int4pack_cpu.pack(*weights[:3]), K, weights.scales.shape[0])
    assert torch.equal(q, weights.q)
    assert torch.equal(scales, weights.scales)
    assert torch.equal(zeros, weights.zeros)


@pytest.mark.parametrize("M", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("keep_dense", [True, False])
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_products_on_both_sides_of_the_crossover(N, K, group_size, keep_dense, M):
    weights = random_weights(N, K, group_size, sym=M == 3)
    bias = torch.randn(N).bfloat16()
    layer = QuantLinear(weights, bias, 4, torch.bfloat16, keep_dense)
    if int4pack_cpu.usable(N, K, group_size):
        assert layer.storage == "cpu_int4"
    x = torch.randn(M, K).bfloat16()
    assert_close(layer(x), x, weights, bias)
    assert torch.equal(layer(x[None])[0], layer(x))  # leading dimensions, and the same bits again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep_dense", [True, False])
def test_other_dtypes_go_another_way(dtype, keep_dense):
    weights = random_weights(64, 128, 64)
    layer = QuantLinear(weights, None, 4, torch.bfloat16, keep_dense)
    x = torch.randn(5, 128).to(dtype)
    assert_close(layer(x), x, weights)


@pytest.mark.parametrize(("N", "K"), [(17, 64), (16, 48), (1, 32), (100, 320)])
def test_shapes_that_the_op_does_not_take(N, K):
    weights = random_weights(N, K, -1)
    layer = QuantLinear(weights, None, 4, torch.bfloat16)
    x = torch.randn(2, K).bfloat16()
    assert_close(layer(x), x, weights)


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_ride_in_nibbles(bits):
    weights = random_weights(32, 64, 32, top=2**bits - 1)
    layer = QuantLinear(weights, None, bits, torch.bfloat16)
    x = torch.randn(2, 64).bfloat16()
    assert_close(layer(x), x, weights)
    assert torch.equal(layer.quantized().q, weights.q)


def test_activation_order_is_a_permutation_of_the_input():
    weights = random_weights(32, 128, 32)
    g_idx = (torch.randperm(128) // 32).to(torch.int32)
    layer = QuantLinear(weights._replace(g_idx=g_idx), None, 4, torch.bfloat16)
    x = torch.randn(2, 128).bfloat16()
    assert_close(layer(x), x, weights._replace(g_idx=g_idx))
    assert torch.equal(layer.quantized().q, weights.q)
    assert torch.equal(layer.quantized().g_idx, g_idx)


def test_unequal_groups_stay_as_they_are():
    weights = random_weights(16, 64, 32)
    g_idx = (torch.arange(64) >= 40).to(torch.int32)
    layer = QuantLinear(weights._replace(g_idx=g_idx), None, 4, torch.bfloat16)
    assert layer.storage == "bytes"
    x = torch.randn(2, 64).bfloat16()
    assert_close(layer(x), x, weights._replace(g_idx=g_idx))


def test_the_integers_take_half_a_byte():
    if not int4pack_cpu.usable(256, 512, 128):
        pytest.skip("torch's int4 op is scalar on this CPU")
    layer = QuantLinear(random_weights(256, 512, 128), None, 4, torch.bfloat16)
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert held == 256 * 512 // 2 + 4 * 256 * 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_same_on_a_lesser_cpu(capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not lesser"]
    root = ROOT
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
