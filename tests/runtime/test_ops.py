"""The custom operators: what they declare to torch.compile and autograd is correct."""

import pytest
import torch

from qsun.model.quantized import Quantized
from qsun.runtime.quant_linear import QuantLinear
from tests.kernels.test_int4_cpu import random_weights

ACTORDER = (torch.arange(64) % 2).to(torch.int32)


def layers():
    for dtype in (torch.float32, torch.bfloat16):
        for g_idx in (None, ACTORDER):
            weights = Quantized(*random_weights(32, 64, 32)[:3], g_idx)
            yield pytest.param(weights, dtype, id=f"{dtype}-{'actorder' if g_idx is not None else 'plain'}")


@pytest.mark.parametrize(("weights", "dtype"), layers())
def test_schema_fake_and_autograd_agree(weights, dtype):
    layer = QuantLinear(weights, None, 4, dtype)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    if layer.storage == "bytes":
        arguments = (x, layer.q, layer.scales, layer.zeros, layer.g_idx, None, None)
        torch.library.opcheck(torch.ops.qsun.bytes_linear.default, arguments)
        grad = torch.randn(3, 32, dtype=dtype)
        inner = (grad, layer.q, layer.scales, layer.zeros, layer.g_idx, None)
        torch.library.opcheck(torch.ops.qsun.bytes_input_grad.default, inner)
        return
    arguments = (x, layer.words, layer.scales, None, layer.order, None, None, None, 32, 32, 4, False)
    torch.library.opcheck(torch.ops.qsun.packed_linear.default, arguments)
    inner = (torch.randn(3, 32, dtype=dtype), layer.words, layer.scales, None, layer.order, None, 64, 32, 4)
    torch.library.opcheck(torch.ops.qsun.packed_input_grad.default, inner)


@pytest.mark.parametrize(("weights", "dtype"), layers())
@pytest.mark.parametrize("keep_dense", [True, False])
def test_gradient_of_the_input(weights, dtype, keep_dense):
    layer = QuantLinear(weights, torch.randn(32), 4, dtype, keep_dense)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    direction = torch.randn(2, 5, 32, dtype=dtype)
    layer(x).backward(direction)
    wanted = direction.double() @ weights.dequantize(torch.float64)
    bound = direction.double().abs() @ weights.dequantize(torch.float64).abs()
    assert ((x.grad.double() - wanted).abs() <= 2 * torch.finfo(dtype).eps * bound + 1e-6).all()


@pytest.mark.parametrize(("weights", "dtype"), layers())
def test_compiled_as_one_op(weights, dtype):
    layer = QuantLinear(weights, torch.randn(32), 4, dtype)
    graphs = []

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, 64, dtype=dtype)
    assert torch.equal(compiled(x), layer(x))
    assert sum(target.startswith("qsun.") for target in graphs[0]) == 1


def test_epilogues():
    weights = random_weights(64, 64, 32)
    layer = QuantLinear(weights, None, 4, torch.bfloat16)
    if layer.storage == "bytes":
        pytest.skip("this CPU has no int4 op")
    x, residual = torch.randn(2, 64).bfloat16(), torch.randn(2, 32).bfloat16()
    fixed = (x, layer.words, layer.scales, None, None, None, None)
    y = torch.ops.qsun.packed_linear(*fixed, residual, 64, 32, 4, True)
    gate, up = (x.double() @ weights.dequantize(torch.float64).t()).chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up + residual.double()
    assert ((y.double() - wanted).abs() <= 0.03 * (1 + gate.abs()) * (1 + up.abs())).all()
    with pytest.raises(NotImplementedError, match="epilogues"):
        torch.ops.qsun.packed_linear(x.requires_grad_(), *fixed[1:], residual, 64, 32, 4, True)
