"""The machine code of the kernels, without a GPU: no spills, wide loads, tensor cores, few instructions a weight."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from qsun.kernels.fields_triton import dequantize_tiles
from qsun.kernels.launch_table import KernelLaunch, load_launch_table
from qsun.kernels.layout import TILES
from tests.kernels.offline import compile_kernel
from tests.kernels.packed_signature import assert_well_compiled as check
from tests.kernels.packed_signature import compile_product, lane_instructions

NARROW, WIDE = KernelLaunch(64, 8, 4, 2, 3, True, 2), KernelLaunch(128, 8, 4, 2, 3, True, 2)
BUCKETS = [(bits, bucket) for bits, buckets in load_launch_table("default").buckets.items() for bucket in buckets]
GROUPS = [(128, False), (128, True), (64, True), (32, False), (32, True), (0, False), (0, True)]


def word_bytes(code, launch, bits):
    """Bytes of weights that a pass of the loop reads: its loads of 128 bits, without those of x."""
    threads, tile = 32 * launch.warps, TILES[bits]
    of_x = launch.tiles * tile.planes * (tile.lanes * launch.block_m * 2 // threads // 16)
    return 16 * threads * (code.in_loop("LDGSTS.E.BYPASS.128") - of_x)


def bucket_of(bits, M, group):
    """The default table's bucket for M and a group, 0 for one group a row."""
    return next(b for bits_of, b in BUCKETS if bits_of == bits and b.max_m >= M and b.max_group >= (group or 1 << 20))


def exchanges(code):
    """Stores to shared memory and barriers in the main loop."""
    return code.in_loop("STS"), code.in_loop("BAR")


@pytest.mark.parametrize(
    ("launch", "group", "asym", "bf16", "most"),
    [
        (NARROW, 128, False, True, 2.6),
        (NARROW, 32, True, True, 3.2),
        (WIDE, 128, False, True, 2.6),
        (replace(WIDE, tiles=1), 32, True, True, 3.2),
        (NARROW, 128, True, True, 2.6),
        (NARROW, 0, False, True, 2.2),
        (NARROW, 128, False, False, 2.6),
    ],
    ids=lambda value: f"{value.block_n}rows" if isinstance(value, KernelLaunch) else str(value),
)
def test_instructions_of_a_weight_at_small_batch(launch, group, asym, bf16, most):
    code = compile_product(launch, 4, group, asym, bf16=bf16)
    check(code)
    assert lane_instructions(code, launch, 4) <= most, code.loop
    assert exchanges(code) == (0, 2)  # the pipeline's own barriers, and scales go through registers only
    assert code.registers <= (200 if group != 32 or launch.block_n == 64 else 255)
    assert word_bytes(code, launch, 4) == launch.block_n * 64 * launch.tiles


@pytest.mark.parametrize(
    ("bits", "group", "asym", "bf16", "most"),
    [
        (2, 128, False, True, 1.6),
        (2, 128, True, True, 1.8),
        (2, 32, True, True, 2.9),
        (2, 128, False, False, 1.6),
        (3, 128, False, True, 1.9),
        (3, 32, True, True, 3.6),
        (3, 0, False, True, 1.7),
        (8, 128, False, True, 2.6),
        (8, 32, True, True, 3.8),
        (8, 128, False, False, 2.0),
    ],
)
def test_2_3_and_8_bits_at_small_batch(bits, group, asym, bf16, most):
    """A row of 256 columns takes 64, 96 and 256 bytes, each read once. Budgets at group 128: 2.07, 3.04 and 7.9."""
    launch = replace(bucket_of(bits, 1, group).launch, split_k=4)
    code = compile_product(launch, bits, group, asym, bf16=bf16)
    check(code, bits)
    assert lane_instructions(code, launch, bits) <= most, code.loop
    assert exchanges(code) == (0, 2)
    assert code.registers <= 200
    assert word_bytes(code, launch, bits) == launch.block_n * TILES[bits].columns * bits // 8


@pytest.mark.parametrize("bits", TILES)
def test_scales_have_a_pass_to_arrive(bits):
    """A pass uses the scales that the one before loaded; loaded late, each pass would wait for memory."""
    for M in (4, 8):
        launch = replace(bucket_of(bits, M, 128).launch, split_k=4)
        code = compile_product(launch, bits, 128, False)
        assert code.slack >= 0.6 * code.loop.total()
        assert any("PF2" in name for name in code.instructions)  # the prefetch of later scales


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("bits", TILES)
def test_weights_are_fetched_before_the_wait(bits, asym):
    """Into L2 only, by one instruction for 64 rows: nothing of a kernel before this one is read or written early."""
    launch = replace(bucket_of(bits, 8, 128).launch, split_k=4)
    code = compile_product(launch, bits, 128, asym)
    assert code.waits_first()
    (wait,), (go,) = code.place("ACQBULK"), code.place("PREEXIT")
    fetches = code.place("UBLKPF.L2", "CCTL.E.PF2")
    assert len(fetches) >= launch.block_n // 64 * (2 + asym)
    assert max(fetches) < wait < go < min(code.place("LDGSTS"))


def test_gpus_without_programmatic_launches_do_not_wait():
    launch = replace(bucket_of(4, 8, 128).launch, split_k=4)
    assert not compile_product(launch, 4, 128, False, capability=80).place("ACQBULK", "UBLKPF", "PREEXIT")


@pytest.mark.parametrize("bits", TILES)
def test_dequantization_does_not_spill(bits):
    types = {f"{name}_ptr": "*bf16" for name in ("scales", "zeros", "out")} | {"words_ptr": "*i16"}
    types |= {"N": "i32!", "K": "i32!", "padded_n": "i32!"}
    code = compile_kernel(dequantize_tiles, types, {"BITS": bits, "GROUP": 32, "ASYM": True}, 90, 4)
    assert not code.spills()
    assert any(name.startswith("LDG") and name.endswith("128") for name in code.instructions)
    assert any(name.startswith("STG.E.128") for name in code.instructions)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("bits", "bucket"),
    BUCKETS,
    ids=lambda b: f"{b}bit" if isinstance(b, int) else f"M{b.max_m}g{min(b.max_group, 128)}",
)
def test_every_default_compiles_well(bits, bucket, capability):
    launch = replace(bucket.launch, split_k=4)
    groups = [(group, asym) for group, asym in GROUPS if bucket_of(bits, bucket.max_m, group) == bucket]
    for group, asym in groups if bits == 4 or capability == 90 else groups[-2:]:
        check(compile_product(launch, bits, group, asym, capability=capability), bits, capability)
    options = {"epilogue": "s", "even_k": False, "capability": capability}
    check(compile_product(launch, bits, groups[0][0], True, **options), bits, capability)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "most"),
    [(2, [2.1, 2.5, 2.5]), (3, [2.3, 3.0, 3.0]), (4, [3.0, 3.2, 4.5]), (8, [3.1, 3.5, 4.9])],
)
def test_instructions_of_a_weight_at_larger_batch(bits, most):
    for M, limit in zip((16, 32, 64), most, strict=True):
        launch = bucket_of(bits, M, 128).launch
        assert lane_instructions(compile_product(launch, bits, 128, False), launch, bits) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("launch", [NARROW, WIDE], ids=["64rows", "128rows"])
@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus_need_no_more_instructions(launch, capability):
    for group, asym, most in ((128, False, 2.8), (64, True, 3.0)):
        code = compile_product(launch, 4, group, asym, capability=capability)
        assert lane_instructions(code, launch, 4) <= most
