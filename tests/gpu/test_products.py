"""The product kernels on a CUDA device against float64: the same bits twice, and inside a CUDA graph (`make gpu`).

What matters most comes first: time may end.
"""

from itertools import product

import pytest
import torch

from qsun.kernels.launch_table import candidates, choose_launch, workspace_bytes
from qsun.kernels.layout import pack_weights
from qsun.kernels.reference import dequantize
from qsun.kernels.workspace import Workspace
from tests.kernels.oracle import draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
GAPS = [0, 40]  # columns between rows: as in a model, and rows that are not aligned
DTYPES = [torch.bfloat16, torch.float16]
# Every seventh and every fifth of all combinations, which share no factor with the lists: each value meets each other.
# A kernel is compiled for each combination, and `make gpu` has two minutes for all tests.
GRIDS = list(product(GAPS, [1, 3, 8, 9, 16, 17, 33, 64, 130], [32, 64, 128, -1], ["middle", "random"], DTYPES))[::7]
OTHER_BITS = list(product([2, 3, 8], [1, 9, 17, 64], [32, 128, -1], ["middle", "random"], DTYPES))[::5]


@pytest.fixture
def kernels():
    """The module, imported where there is a device: Triton is optional."""
    pytest.importorskip("triton")
    from qsun.kernels import packed_triton

    return packed_triton


def poisoned_workspace(M, N, K, group_size, bits=4):
    size, counters = workspace_bytes(M, N, K, group_size, torch.cuda.get_device_name(), bits)
    space = Workspace.allocate(size, counters, "cuda")
    space.buffer.fill_(255)  # NaN
    return space


def check(kernels, drawn, launch=None):
    M, K = drawn.x.shape
    N = drawn.arguments()[4]
    space = poisoned_workspace(M, N, K, drawn.group_size, drawn.bits) if launch is None else None
    options = drawn.options() | {"workspace": space, "launch": launch}
    first, second = (kernels.packed_product(*drawn.arguments(), **options) for _ in range(2))
    assert torch.equal(first, second)
    assert space is None or not space.counters.any()
    # tensor cores truncate where the oracle's bound rounds: twice as far
    assert ((first.double() - drawn.exact).abs() <= 2 * drawn.bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 64, 7, 16, 32, 128])
def test_llama_shapes(kernels, M, dtype):
    for N, K in LLAMA_8B:
        check(kernels, draw(M, N, K, 128, dtype, device="cuda", seed=N + K + M))


@pytest.mark.parametrize("M", [1, 8, 64])
def test_inside_a_cuda_graph(kernels, M):
    N, K = 6144, 4096
    drawn = draw(M, N, K, 128, torch.bfloat16, epilogue="b", device="cuda")
    assert choose_launch(M, N, K, 128, torch.cuda.get_device_name()).split_k > 1
    options = drawn.options() | {"workspace": poisoned_workspace(M, N, K, 128)}
    eager = kernels.packed_product(*drawn.arguments(), **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.packed_product(*drawn.arguments(), **options)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)


@pytest.mark.parametrize("M", [1, 64])
def test_a_chain_waits_for_its_inputs(kernels, M, monkeypatch):
    """Each kernel reads what the one before it wrote, in a shared workspace: the bits of one after the other."""
    N = K = 1024
    norm = torch.ones(K, device="cuda", dtype=torch.bfloat16)
    drawn = [draw(M, N, K, 128, torch.bfloat16, device="cuda", seed=seed) for seed in range(6)]
    space = poisoned_workspace(M, N, K, 128)

    def run(x):
        for each in drawn:
            y = kernels.packed_product(x, *each.arguments()[1:], workspace=space)
            x = decode_cuda.rms_norm(y, norm, 1e-5)
        return x

    decode_cuda = pytest.importorskip("qsun.kernels.decode_cuda")
    held, graph = drawn[0].x.clone(), torch.cuda.CUDAGraph()
    run(held)
    with torch.cuda.graph(graph):
        captured = run(held)
    for owner in (kernels, decode_cuda):
        monkeypatch.setattr(owner, "pdl_options", lambda _: {"PDL": False})
    for _ in range(50):
        held.copy_(torch.randn_like(held))
        graph.replay()
        assert torch.equal(captured, run(held))


@pytest.mark.parametrize(("gap", "M", "group_size", "zeros", "dtype"), GRIDS, ids=str)
def test_groups_zero_points_and_batches(kernels, gap, M, group_size, zeros, dtype):
    check(kernels, draw(M, 208, 640, group_size, dtype, zeros, epilogue="br", device="cuda", seed=M, gap=gap))


@pytest.mark.parametrize("epilogue", ["b", "r", "s", "brs"])
@pytest.mark.parametrize("M", [1, 12, 64])
@pytest.mark.parametrize("gap", GAPS)
def test_epilogues(kernels, gap, M, epilogue):
    check(kernels, draw(M, 2816, 512, 128, torch.bfloat16, epilogue=epilogue, device="cuda", gap=gap))


@pytest.mark.parametrize("M", [1, 64])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_llama_shapes_of_other_bits(kernels, bits, M):
    for N, K in LLAMA_8B:
        check(kernels, draw(M, N, K, 128, torch.bfloat16, device="cuda", seed=N + K + M, bits=bits))


@pytest.mark.parametrize(("bits", "M", "group_size", "zeros", "dtype"), OTHER_BITS, ids=str)
def test_other_bits(kernels, bits, M, group_size, zeros, dtype):
    check(kernels, draw(M, 208, 640, group_size, dtype, zeros, epilogue="br", device="cuda", seed=M, bits=bits))


def test_many_rows_are_dequantized(kernels):
    drawn = draw(700, 1024, 1024, 128, torch.bfloat16, epilogue="b", device="cuda")
    y = kernels.packed_product(*drawn.arguments(), **drawn.options())
    assert (y.double() - drawn.exact).norm() < 2.0**-7 * drawn.exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 32, 32), (80, 416, 32), (176, 320, 64), (48, 224, -1)])
def test_tails(kernels, N, K, group_size, dtype):
    for M, gap in product((1, 9, 40), GAPS):
        check(kernels, draw(M, N, K, group_size, dtype, "random", device="cuda", gap=gap))


@pytest.mark.parametrize("zeros", ["0", "top"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_zero_points_and_scales(kernels, dtype, zeros):
    check(kernels, draw(4, 128, 512, 64, dtype, zeros, "wild", device="cuda"))


@pytest.mark.parametrize("M", [1, 16, 64])
def test_launches_that_tuning_tries(kernels, M):
    drawn = draw(M, 512, 1024, 64, torch.bfloat16, device="cuda")
    launches = list(candidates(M, 512, 1024, 64))
    for launch in launches[:: len(launches) // 12]:
        check(kernels, drawn, launch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("N", "K", "group_size"), [(80, 416, 32), (176, 320, 64), (80, 96, -1), (1024, 4096, 128)])
def test_dequantize(kernels, N, K, group_size, bits, dtype):
    groups = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(groups, N, device="cuda") - 0.5).to(dtype)
    zeros = torch.randint(0, 1 << bits, (groups, N), device="cuda")
    out = torch.full((N, K), float("nan"), dtype=dtype, device="cuda")
    kernels.packed_dequantize(*pack_weights(q, scales, zeros, group_size, dtype, bits), N, K, group_size, out, bits)
    assert torch.equal(out, dequantize(q, scales, zeros, None, torch.float64).to(dtype))
