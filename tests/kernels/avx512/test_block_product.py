"""int4 products in dequantized blocks: every weight exactly, sums against float64, and the machine code they become."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qsun.kernels import int4pack_cpu
from qsun.kernels.avx512 import block_product as blocks
from qsun.kernels.avx512.block_code import MOST_ROWS, write_block_code
from qsun.model.quantized import Quantized
from qsun.runtime.quant_linear import QuantLinear
from tests.kernels.test_int4_cpu import random_weights
from tests.places import ROOT

here = pytest.mark.skipif(not blocks.available(), reason="no AVX-512 with bfloat16 instructions, or no llvmlite")
SHAPES = [
    (64, 32, 32),
    (80, 192, 64),
    (112, 640, 128),
    (192, 576, -1),
    (256, 1056, 32),
    (576, 512, 256),
    (64, 1536, 128),
]
BATCHES = [5, 6, 7, 8, 9, 13, 16, 31, MOST_ROWS, MOST_ROWS + 1, 2 * MOST_ROWS + 5]


def product_of(weights, x):
    return int4pack_cpu.block_product(x, *int4pack_cpu.pack(*weights[:3]))


@here
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
@pytest.mark.parametrize("sym", [True, False])
def test_every_weight_is_the_dense_copys(N, K, group_size, sym):
    """The rows of an identity matrix pick out single weights; the op's own last rows are not rounded to bfloat16."""
    weights = random_weights(N, K, group_size, sym)
    weights.scales[:, ::7] = 0
    whole = N // blocks.BLOCK * blocks.BLOCK
    picked = product_of(weights, torch.eye(K, dtype=torch.bfloat16))
    assert torch.equal(picked.t()[:whole], weights.dequantize(torch.float64).bfloat16()[:whole])


@here
@pytest.mark.parametrize(("N", "K", "group_size"), SHAPES)
def test_products_against_float64(N, K, group_size):
    weights = random_weights(N, K, group_size)
    exact = weights.dequantize(torch.float64).bfloat16().double()
    whole = N // blocks.BLOCK * blocks.BLOCK
    for M in BATCHES:
        x = (torch.randn(M, K) * 2 ** torch.randint(-4, 5, (M, K))).bfloat16()
        wanted = (x.double() @ exact.t())[:, :whole]
        slack = (x.double().abs() @ exact.abs().t())[:, :whole]
        limit = 2**-8 * wanted.abs() + K * 2**-24 * slack  # one rounding to bfloat16, and float32 sums
        y = product_of(weights, x)
        assert y.shape == (M, N)
        assert ((y.double()[:, :whole] - wanted).abs() <= limit).all(), M


@here
def test_a_row_depends_on_no_other_row_and_on_no_thread():
    weights = random_weights(320, 768, 128)
    x = torch.randn(MOST_ROWS + 20, 768).bfloat16()
    together = product_of(weights, x)
    for M in (5, 6, 7, 8, 11, 64):
        assert torch.equal(product_of(weights, x[:M]), together[:M])
    alone = [product_of(weights, row[None]) for row in x[-3:]]
    assert torch.equal(torch.cat(alone), together[-3:])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 64):
            torch.set_num_threads(count)
            assert torch.equal(product_of(weights, x), together)
    finally:
        torch.set_num_threads(threads)


@here
def test_infinities_stay_in_their_rows():
    weights = random_weights(64, 128, 128, sym=True)
    x = torch.randn(6, 128).bfloat16()
    x[2, 5] = torch.inf
    y = product_of(weights, x)
    assert torch.isfinite(y[[0, 1, 3, 4, 5]]).all()
    assert not torch.isfinite(y[2]).any()  # where the weight is 0 too: infinity times it is NaN


@here
def test_layers_use_blocks_and_keep_no_dense_copy():
    """Without AMX int4 is the faster one at every batch (docs/kernels.md)."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("AMX multiplies dense copies faster")
    weights = Quantized(*random_weights(128, 256, 128)[:3])
    layer = QuantLinear(weights, None, 4, torch.bfloat16, keep_dense=True)
    for M in (1, 4, 5, 64, 200):
        x = torch.randn(M, 256).bfloat16()
        product = int4pack_cpu.block_product if M > 4 else int4pack_cpu.packed_product
        assert torch.equal(layer(x), product(x, layer.words, layer.scales))
        assert layer.read_bytes(M) < 128 * 256
    assert layer._dense is None


@pytest.fixture
def not_compiled():
    blocks._compiled_once.cache_clear()
    blocks.available.cache_clear()
    yield
    blocks._compiled_once.cache_clear()
    blocks.available.cache_clear()


def test_threads_compile_once(monkeypatch, not_compiled):
    class Slow:
        def __init__(self):
            time.sleep(0.05)

    monkeypatch.setattr(blocks, "_Compiled", Slow)
    with ThreadPoolExecutor(4) as threads:
        made = [future.result() for future in [threads.submit(blocks._compiled) for _ in range(4)]]
    assert len(set(map(id, made))) == 1


def test_a_library_that_cannot_be_loaded(monkeypatch, not_compiled):
    def fail():
        raise OSError("Could not find/load shared object file")

    monkeypatch.setattr(blocks, "_Compiled", fail)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not blocks.available()


WITHOUT_LLVMLITE = """
import sys
sys.modules["llvmlite"] = None
import torch
from qsun.kernels import int4pack_cpu
from qsun.runtime.quant_linear import QuantLinear
from tests.kernels.test_int4_cpu import assert_close, random_weights
assert not int4pack_cpu.blocks_win(64)
weights = random_weights(128, 256, 64)
x = torch.randn(64, 256).bfloat16()
for keep in (True, False):
    layer = QuantLinear(weights, None, 4, torch.bfloat16, keep)
    assert_close(layer(x), x, weights)
    assert (layer._dense is not None) == (keep and not int4pack_cpu.int4_wins(64))
"""


@pytest.mark.slow
def test_without_llvmlite_products_are_torchs():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_LLVMLITE]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def functions(assembly):
    """Return each function's instructions by its name."""
    found, name = {}, None
    for line in assembly.splitlines():
        if label := re.match(r"(\w+):", line):
            name = label[1]
        elif name and re.match(r"\t[a-z]", line):
            found.setdefault(name, []).append(line.split()[0])
    return found


def test_the_code_of_the_loops():
    """Compiled for Zen 4 on any machine: no sums in memory, and one instruction a product, table and rounding."""
    llvm = pytest.importorskip("llvmlite.binding")
    if llvm.llvm_version_info[0] < 20:
        pytest.skip("an LLVM before 20 reads other names")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu="znver4", opt=3)
    code = functions(target.emit_assembly(llvm.parse_assembly(write_block_code())))
    for rows in range(1, 7):
        kernel = code[f"multiply{rows}"]
        assert kernel.count("vdpbf16ps") == 4 * rows
        assert sum(line.startswith("vmov") for line in kernel) <= 2 * 4 * rows + 4  # sums in and out, and four weights
    dequantize = code["dequantize"]
    assert dequantize.count("vpermd") + dequantize.count("vpermps") == 8
    assert dequantize.count("vcvtne2ps2bf16") == 4
    assert dequantize.count("vpermw") == 4
