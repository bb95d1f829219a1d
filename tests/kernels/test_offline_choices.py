"""The machine code of the launches that a model's layers get: choose_launch halves the table's rows and warps, too."""

import pytest

pytest.importorskip("triton")

from qsun.kernels.launch_table import choose_launch
from qsun.kernels.layout import TILES
from tests.kernels.packed_signature import assert_well_compiled, compile_product, lane_instructions

LAYERS = {  # of Llama-3.1-8B, Qwen2.5-7B and Llama-3.2-1B
    "qkv": [(6144, 4096), (4608, 3584), (3072, 2048)],
    "o": [(4096, 4096), (3584, 3584), (2048, 2048)],
    "gate_up": [(28672, 4096), (37888, 3584), (16384, 2048)],
    "down": [(4096, 14336), (3584, 18944), (2048, 8192)],
}
ROWS = [1, 4, 8, 16, 17, 32, 33, 48, 64, 128]
GRIDS = [(2, 128), (3, 128), (4, 128), (4, 64), (4, 32), (8, 128)]
# Instructions a weight at 8, 16, 32 and 64 rows of x a program; the bytes of a weight times 7.8 are what an H200 has.
MOST = {
    (2, 128): [1.6, 2.0, 2.6],
    (3, 128): [1.9, 2.3, 2.9],
    (4, 128): [1.9, 2.4, 3.2, 4.2],
    (4, 64): [2.1, 2.7, 3.5, 4.8],
    (4, 32): [2.5, 3.4, 4.2, 6.1],
    (8, 128): [2.7, 3.1, 3.6, 4.8],
}
# 64 rows on 4 warps, where Triton takes HGMMA, have more, and are faster on an H200 all the same (docs/kernels.md).
MORE = 0.8


def choices():
    """The distinct (bits, group, launch, epilogue)."""
    found = {}
    for bits, group in GRIDS:
        for layer, shapes in LAYERS.items():
            for N, K in shapes:
                for M in ROWS:
                    launch = choose_launch(M, N, K, group, "default", bits)
                    assert K % (TILES[bits].columns * launch.tiles) == 0  # so EVEN_K is the same for all
                    found.setdefault((bits, group, launch, "s" if layer == "gate_up" else "br"), (N, K, M))
    return found


CHOICES = choices()
# Of Llama-3.1-8B at M = 17, 33 and 48: launches that are in no table.
QUICK = [(4, 128, 6144, 4096, 17), (4, 128, 6144, 4096, 48), (8, 128, 6144, 4096, 33), (4, 128, 28672, 4096, 33)]


def check(bits, group, launch, epilogue, asym=False):
    code = compile_product(launch, bits, group, asym, epilogue=epilogue)
    assert_well_compiled(code, bits)
    assert code.waits_first()
    words, values = code.place("UBLKPF.L2"), code.place("CCTL.E.PF2")
    (wait,), (go,) = code.place("ACQBULK"), code.place("PREEXIT")
    assert len(words) == launch.block_n // 64
    assert len(values) >= 1 + (asym and launch.fold)
    assert max(words + values) < wait < go < min(code.place("LDG", "STG", "ATOM"))
    if not asym:
        most = MOST[bits, group][(launch.block_m // 8).bit_length() - 1]
        few_rows = launch.block_m == 32 and launch.block_n < 32 * launch.warps
        assert lane_instructions(code, launch, bits) <= most + MORE * few_rows, code.loop


@pytest.mark.parametrize(("bits", "group", "N", "K", "M"), QUICK)
def test_choices_that_no_table_has(bits, group, N, K, M):
    launch = choose_launch(M, N, K, group, "default", bits)
    check(bits, group, launch, "s" if N == 28672 else "br")


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c[0]}bit-g{c[1]}-{'x'.join(map(str, CHOICES[c]))}-{c[3]}")
def test_what_layers_get(choice):
    check(*choice)


@pytest.mark.slow
@pytest.mark.parametrize("bits", TILES)
def test_what_layers_get_with_zero_points(bits):
    for *choice, epilogue in CHOICES:
        if choice[:2] == [bits, 128] and epilogue == "br":
            check(*choice, epilogue, asym=True)
