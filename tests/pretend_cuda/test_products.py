"""QuantLinear on a pretended CUDA device: which kernels a product launches, on which device, for which inputs."""

import pytest
import torch

from qsun.engine.warming import _warm_products
from qsun.errors import QsunError
from qsun.kernels.workspace import reserved
from qsun.model.quantized import Quantized
from qsun.runtime import quant_linear
from qsun.runtime.quant_linear import QuantLinear

N, K, GROUP = 128, 256, 128


def weights(bits=4, device="cuda"):
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)
    scales = torch.rand(K // GROUP, N, generator=generator) * 0.01 + 0.01
    zeros = torch.full((K // GROUP, N), 2 ** (bits - 1), dtype=torch.uint8)
    return Quantized(q, scales.bfloat16().float(), zeros).to(torch.device(device))


def layer(bits=4, dtype=torch.bfloat16, device="cuda"):
    return QuantLinear(weights(bits, device), None, bits, dtype)


def kernels(log, product, x):
    """The kernels of one product, after a first one; checks its result against the dequantized weights."""
    product(x)
    log.clear()
    y = product(x)
    counted = dict(log.kernels)
    wanted = x.float() @ product.weight_in(torch.float32).t()
    assert y.dtype == x.dtype
    assert y.device == x.device
    assert float((y.float() - wanted).norm()) <= 0.01 * float(wanted.norm())
    return counted


INPUTS = {
    "rows": lambda: torch.randn(4, K, device="cuda", dtype=torch.bfloat16),
    "three dimensions": lambda: torch.randn(2, 3, K, device="cuda", dtype=torch.bfloat16),
    "one dimension": lambda: torch.randn(K, device="cuda", dtype=torch.bfloat16),
    "sliced rows": lambda: torch.randn(2, 3, K + 44, device="cuda", dtype=torch.bfloat16)[..., :K],
    "transposed": lambda: torch.randn(K, 4, device="cuda", dtype=torch.bfloat16).t(),
    "every second column": lambda: torch.randn(4, 2 * K, device="cuda", dtype=torch.bfloat16)[:, ::2],
    "expanded": lambda: torch.randn(1, K, device="cuda", dtype=torch.bfloat16).expand(4, K),
    "transposed batch": lambda: torch.randn(2, K, 3, device="cuda", dtype=torch.bfloat16).transpose(1, 2),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_a_linear_layer_accepts(pretend_cuda, name):
    x = INPUTS[name]()
    assert "triton::packed_matmul" in kernels(pretend_cuda, layer(), x)


@pytest.mark.parametrize(("bits", "read"), [(2, 64), (3, 96), (4, 128), (8, 256)])
def test_one_kernel_a_product_of_any_bits(pretend_cuda, bits, read):
    x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    product = layer(bits)
    assert kernels(pretend_cuda, product, x) == {"triton::packed_matmul": 1}
    assert pretend_cuda.launches[-1]["BITS"] == bits
    assert product.read_bytes(1) == N * read + 2 * N * 2  # words, and bfloat16 scales of two groups
    assert torch.equal(product.quantized().q.cpu(), weights(bits).q.cpu())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradient_of_the_input(pretend_cuda, bits):
    """One kernel dequantizes for the product, in the dtype of both; other dtypes unpack."""
    product = layer(bits)
    held = (product.words, product.scales, product.zeros, None, None)
    for dtype, launched in ((torch.bfloat16, ["dequantize_tiles"]), (torch.float32, [])):
        grad = torch.randn(3, N, device="cuda").to(dtype)
        pretend_cuda.launches.clear()
        found = torch.ops.qsun.packed_input_grad(grad, *held, K, GROUP, bits)
        assert [launch["kernel"] for launch in pretend_cuda.launches] == launched
        wanted = grad.cpu().double() @ product.weight_in(torch.float32).cpu().double()
        assert (found.cpu().double() - wanted).norm() <= 0.01 * wanted.norm()


def test_layers_that_differ_in_bias_or_dtype_are_all_warmed(pretend_cuda):
    """A kernel is compiled for each of them."""
    biases = (None, torch.zeros(N, device="cuda"))
    dtypes = (torch.bfloat16, torch.float16)
    layers = [QuantLinear(weights(), bias, 4, dtype) for bias in biases for dtype in dtypes]
    pretend_cuda.launches.clear()
    _warm_products(torch.nn.ModuleList(layers), 1)
    assert len({(each["BIAS"], each["BF16"]) for each in pretend_cuda.launches}) == 4


def test_no_rows(pretend_cuda):
    assert layer()(torch.randn(0, K, device="cuda", dtype=torch.bfloat16)).shape == (0, N)


def test_a_layer_that_moves_reserves_a_workspace_there(pretend_cuda):
    here = layer()
    assert reserved(torch.device("cuda:1")) is None
    moved = here.to("cuda:1")
    assert reserved(torch.device("cuda:1")).buffer.device == torch.device("cuda:1")
    x = torch.randn(1, K, device="cuda:1").bfloat16()
    assert kernels(pretend_cuda, moved, x) == {"triton::packed_matmul": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_that_is_cast_keeps_its_kernel(pretend_cuda, dtype):
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    cast = layer(dtype=other).to(dtype)
    before = layer(dtype=other).quantized()
    assert torch.equal(cast.quantized().q, before.q)
    assert torch.equal(cast.quantized().scales, before.scales)
    assert kernels(pretend_cuda, cast, torch.randn(1, K, device="cuda", dtype=torch.bfloat16).to(dtype)) == {
        "triton::packed_matmul": 1
    }


def test_scales_that_float16_cannot_hold_are_refused(pretend_cuda):
    wide = weights()
    wide = wide._replace(scales=wide.scales * 1e7)
    with pytest.raises(QsunError, match="float16 cannot hold scales up to"):
        QuantLinear(wide, None, 4, torch.bfloat16).half()


@pytest.fixture(autouse=True)
def fresh_warnings():
    quant_linear._warn_of_dequantizing.cache_clear()


def test_an_input_of_another_dtype_is_slow_and_says_so_once(pretend_cuda, caplog):
    product = layer()
    for _ in range(2):
        kernels(pretend_cuda, product, torch.randn(1, K, device="cuda"))
    assert [record.message for record in caplog.records] == [
        "torch.float32 inputs of layers packed for torch.bfloat16 are slow; cast the model or its inputs"
    ]


def unpackable():
    """A layer whose rows no kernel supports."""
    held = weights()
    return Quantized(held.q[:120], held.scales[:, :120], held.zeros[:, :120])


def test_shapes_without_a_kernel_keep_a_dense_copy(pretend_cuda, caplog):
    x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    product = QuantLinear(unpackable(), None, 4, torch.bfloat16, keep_dense=True)
    assert sum(kernels(pretend_cuda, product, x).values()) == 1
    assert product.read_bytes(1) == 120 * K * 2
    assert not caplog.records


def test_shapes_without_a_kernel_or_room_for_a_copy_warn_once(pretend_cuda, caplog):
    product = QuantLinear(unpackable(), None, 4, torch.bfloat16)
    for _ in range(2):
        kernels(pretend_cuda, product, torch.randn(1, K, device="cuda", dtype=torch.bfloat16))
    assert [record.message for record in caplog.records] == [
        "layers without a GPU kernel are dequantized for every product; load with keep_dense=True"
    ]
