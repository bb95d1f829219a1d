"""The product kernels in Triton's interpreter against float64. Run by test_interpreter.py in a process of its own.

float32 runs bfloat16's algebra, offset and all: the interpreter computes bfloat16 itself wrongly.
"""

import pytest
import torch

from qsun.kernels.launch_table import KernelLaunch, choose_launch
from qsun.kernels.layout import pack_weights
from qsun.kernels.packed_triton import packed_dequantize, packed_product
from qsun.kernels.reference import dequantize
from qsun.kernels.workspace import Workspace
from tests.kernels.oracle import draw

pytest_plugins = "tests.kernels.interpreter"

HALF, SINGLE = torch.float16, torch.float32
BITS = [2, 3, 4, 8]


def check(product, launch):
    """Within the bound; splits twice with one poisoned workspace: the same bits, counters back at zero."""
    x = product.x
    N = product.packed.scales.shape[1]
    space = Workspace.allocate(4 * launch.split_k * x.shape[0] * N, 64, "cpu")
    results = []
    for _ in range(2 if launch.split_k > 1 else 1):  # one split uses no workspace
        space.buffer.fill_(255)  # NaN
        results.append(packed_product(*product.arguments(), **product.options(), workspace=space, launch=launch))
        assert not space.counters.any()
    assert torch.equal(results[0], results[-1])
    assert results[0].shape == product.exact.shape
    assert ((results[0].double() - product.exact).abs() <= product.bound).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fold", [True, False], ids=["fold", "centred"])
@pytest.mark.parametrize("zeros", ["middle", "random"])
@pytest.mark.parametrize(
    ("M", "N", "K", "group_size", "dtype"),
    [
        (1, 16, 32, 32, HALF),
        (3, 80, 416, 32, SINGLE),
        (8, 48, 192, 64, HALF),
        (9, 64, 640, 128, SINGLE),
        (1, 112, 160, -1, SINGLE),
        (3, 64, 384, -1, HALF),
        (16, 176, 256, 256, HALF),
        (17, 80, 320, 64, SINGLE),
    ],
    ids=str,
)
def test_shapes_groups_and_zero_points(M, N, K, group_size, dtype, zeros, fold, bits):
    product = draw(M, N, K, group_size, dtype, zeros, seed=M + N + K, gap=0 if fold else 40, bits=bits)
    check(product, KernelLaunch(64, 8 if M <= 8 else 16, 1 + (K > 256), 2, 3, fold))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("M", [1, 9, 33, 64])
def test_the_tables_choice(M, bits):
    N, K, group_size = 192, 1056, 32
    check(draw(M, N, K, group_size, HALF, seed=M, bits=bits), choose_launch(M, N, K, group_size, "default", bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fold", [True, False], ids=["fold", "centred"])
@pytest.mark.parametrize(
    ("K", "group_size", "split_k"),
    [(640, 128, 2), (96, 32, 1), (1056, 32, 2), (512, -1, 3), (512, 64, 1), (1024, 128, 2)],
)
def test_two_tiles_a_pass(K, group_size, split_k, fold, bits):
    """The last pass has two tiles, one, or part of one."""
    launch = KernelLaunch(64, 8, split_k, 2, 3, fold, 2)
    check(draw(3, 80, K, group_size, SINGLE, epilogue="r", seed=K, bits=bits), launch)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("split_k", [1, 2, 5])
@pytest.mark.parametrize("K", [96, 768])
def test_splits(split_k, K, bits):  # 5 splits of 1, 3 or 6 tiles: some have none
    check(draw(3, 128, K, 32, SINGLE, epilogue="br", seed=K, bits=bits), KernelLaunch(128, 8, split_k, 2, 3, True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fold", [True, False], ids=["fold", "centred"])
@pytest.mark.parametrize("zeros", ["0", "top"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_extreme_zero_points_and_scales(dtype, zeros, fold, bits):
    check(draw(3, 64, 256, 64, dtype, zeros, "wild", bits=bits), KernelLaunch(64, 8, 2, 2, 3, fold))


@pytest.mark.parametrize("epilogue", ["b", "r", "br", "s", "bs", "brs"])
@pytest.mark.parametrize(("N", "split_k"), [(96, 1), (176, 2)])
def test_epilogues(epilogue, N, split_k):
    check(draw(3, N, 256, 128, HALF, epilogue=epilogue), KernelLaunch(64, 8, split_k, 2, 3, True))


def test_several_blocks_of_rows():
    check(draw(37, 80, 288, 32, HALF, epilogue="br"), KernelLaunch(64, 16, 2, 2, 3, False))


def test_no_rows():
    product = draw(0, 64, 128, 128, HALF)
    assert packed_product(*product.arguments()).shape == (0, 64)


@pytest.mark.parametrize("epilogue", ["", "br", "bs", "brs"])
def test_many_rows_are_dequantized(epilogue):
    product = draw(513, 80, 96, 32, HALF, epilogue=epilogue)
    y = packed_product(*product.arguments(), **product.options())
    weights = 2.0**-10 * product.x.double().abs().sum(1, keepdim=True) * 15 * 0.03  # rounded to half precision
    slack = weights * (1 if "s" not in epilogue else 1 + product.exact.abs().max())
    assert ((y.double() - product.exact).abs() <= product.bound + slack).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(16, 32, 32), (80, 416, 32), (176, 320, 64), (64, 256, 128), (80, 96, -1)]
)
def test_dequantize(N, K, group_size, asym, bits):
    groups = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    scales = (torch.rand(groups, N) - 0.5).half()
    zeros = torch.randint(0, 1 << bits, (groups, N)) if asym else torch.full((groups, N), 1 << (bits - 1))
    out = torch.empty(N, K, dtype=HALF)
    packed_dequantize(*pack_weights(q, scales, zeros, group_size, HALF, bits), N, K, group_size, out, bits)
    assert torch.equal(out, dequantize(q, scales, zeros, None, torch.float64).half())


def test_what_does_not_fit():
    product = draw(2, 64, 128, 128, HALF)
    x, words, scales, zeros, N, group_size, _bits = product.arguments()
    for bad in (
        (x.bfloat16(), words, scales, zeros, N, group_size),
        (x[:, ::2], words, scales, zeros, N, group_size),
        (x[:, :96], words, scales, zeros, N, group_size),
        (x, words, scales, zeros, 128, group_size),
        (x, words, scales, zeros, 60, group_size),
        (x, words, scales.float(), zeros, N, group_size),
        (x, words, scales, zeros, N, group_size, 2),
        (x, words, scales, zeros, N, group_size, 8),
        (x, words, scales, zeros, N, 64),
    ):
        with pytest.raises(ValueError, match=r"want|use"):
            packed_product(*bad)
    with pytest.raises(ValueError, match="bias"):
        packed_product(*product.arguments(), bias=torch.zeros(63))
    with pytest.raises(ValueError, match="residual"):
        packed_product(*product.arguments(), residual=torch.zeros(2, 32))
    for small in (Workspace.allocate(8, 64, "cpu"), Workspace.allocate(1 << 20, 0, "cpu")):
        with pytest.raises(ValueError, match="workspace_bytes"):
            packed_product(*product.arguments(), workspace=small, launch=KernelLaunch(64, 8, 2, 2, 3, True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(120))
def test_random_products(seed):
    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    generator = torch.Generator().manual_seed(1000 + seed)
    group_size = pick(32, 64, 128, -1)
    K = max(group_size, 32) * pick(1, 2, 3, 5, 7)
    block_n = pick(64, 128, 256)
    N = 16 * pick(1, 3, 5, 9, 12) if block_n == 64 else 256 * pick(1, 2)
    M, block_m = pick(1, 3, 8, 9, 16, 17, 33, 64), pick(8, 16, 32, 64)
    M = min(M, 2 * block_m + 1)  # more blocks of rows are the same again
    launch = KernelLaunch(block_n, block_m, pick(1, 2, 3, 5), 4, 3, pick(True, False), pick(1, 2))
    zeros, scales, epilogue = pick("middle", "0", "top", "random"), pick("even", "wild"), pick("", "b", "r", "br")
    gap, bits = pick(0, 40, 64), pick(*BITS)
    product = draw(M, N, K, group_size, pick(HALF, SINGLE), zeros, scales, epilogue, seed=seed, gap=gap, bits=bits)
    check(product, launch)
