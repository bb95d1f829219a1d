"""The machine code of the kernels, without a GPU: no spills, wide loads, tensor cores, few instructions a weight."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from qsun.kernels.launch_table import KernelLaunch, load_launch_table
from qsun.kernels.nibbles_triton import dequantize_tiles
from tests.kernels.int4_signature import compile_int4, lane_instructions
from tests.kernels.offline import compile_kernel

NARROW, WIDE = KernelLaunch(64, 8, 4, 2, 4, True), KernelLaunch(128, 8, 4, 2, 4, True)
BUCKETS = load_launch_table("default").buckets
DISTINCT = list({(bucket.launch, bucket.max_group): bucket for bucket in BUCKETS}.values())
GROUPS = [(128, False), (128, True), (64, True), (32, False), (32, True), (0, False), (0, True)]


def check(code, launch):
    assert not code.spills()
    assert code.shared_bytes <= 99 * 1024  # what every GPU since sm_80 gives; two programs a processor on sm_90
    assert code.in_loop("LDGSTS.E.BYPASS.128") + code.in_loop("LDG.E.128") > 0, code.loop
    assert code.in_loop("HMMA") + code.in_loop("HGMMA") + code.in_loop("UTCHMMA") > 0, code.loop
    assert code.in_loop("I2F") == 0, code.loop


def bucket_of(M, group):
    """The default table's bucket for M and a group, 0 for one group a row."""
    return next(b for b in BUCKETS if b.max_m >= M and b.max_group >= (group or 1 << 20))


def exchanges(code):
    """Stores to shared memory and barriers in the main loop."""
    return code.in_loop("STS"), code.in_loop("BAR")


@pytest.mark.parametrize(
    ("launch", "group", "asym", "bf16", "most"),
    [
        (NARROW, 128, False, True, 2.6),
        (NARROW, 32, True, True, 3.2),
        (WIDE, 128, False, True, 2.6),
        (WIDE, 32, True, True, 3.2),
        (NARROW, 128, True, True, 2.6),
        (NARROW, 0, False, True, 2.2),
        (NARROW, 128, False, False, 2.6),
    ],
    ids=lambda value: f"{value.block_n}rows" if isinstance(value, KernelLaunch) else str(value),
)
def test_instructions_of_a_weight_at_small_batch(launch, group, asym, bf16, most):
    code = compile_int4(launch, group, asym, bf16=bf16)
    check(code, launch)
    assert lane_instructions(code, launch) <= most, code.loop
    assert exchanges(code) == (0, 2)  # the pipeline's own barriers, and scales go through registers only
    assert code.registers <= 200


def test_dequantization_does_not_spill():
    types = {f"{name}_ptr": "*bf16" for name in ("scales", "zeros", "out")} | {"words_ptr": "*i16"}
    types |= {"N": "i32!", "K": "i32!", "padded_n": "i32!"}
    code = compile_kernel(dequantize_tiles, types, {"GROUP": 32, "ASYM": True}, 90, 4)
    assert not code.spills()
    assert any(name.startswith("LDG.E.128") for name in code.instructions)
    assert any(name.startswith("STG.E.128") for name in code.instructions)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "bucket", load_launch_table("default").buckets, ids=lambda b: f"M{b.max_m}g{min(b.max_group, 128)}"
)
def test_every_default_compiles_well(bucket, capability):
    launch = replace(bucket.launch, split_k=4)
    groups = [(group, asym) for group, asym in GROUPS if bucket_of(bucket.max_m, group) == bucket]
    for group, asym in groups:
        check(compile_int4(launch, group, asym, capability=capability), launch)
    check(compile_int4(launch, groups[0][0], True, epilogue="s", even_k=False, capability=capability), launch)


@pytest.mark.slow
@pytest.mark.parametrize(("block_m", "most"), [(16, 3.0), (32, 3.2), (64, 4.5)])
def test_instructions_of_a_weight_at_larger_batch(block_m, most):
    launch = next(
        b.launch for b in load_launch_table("default").buckets if b.launch.block_m == block_m and b.max_group > 128
    )
    assert lane_instructions(compile_int4(launch, 128, False), launch) <= most


@pytest.mark.slow
@pytest.mark.parametrize("launch", [NARROW, WIDE], ids=["64rows", "128rows"])
@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus_need_no_more_instructions(launch, capability):
    for group, asym, most in ((128, False, 2.8), (32, True, 3.6)):
        assert lane_instructions(compile_int4(launch, group, asym, capability=capability), launch) <= most
