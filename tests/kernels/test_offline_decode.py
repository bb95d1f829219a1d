"""The machine code of a decode step's own kernels, without a GPU: no spills, wide loads, tensor cores in attention."""

import pytest

pytest.importorskip("triton")

from qsun.kernels.decode_triton import gated_rows, rms_norm_rows, rotate_and_store, split_attention
from tests.kernels.offline import compile_kernel


def compile_attention(width, capability=90, kind="*bf16", softcap=False, window=False, fp8=False):
    types = dict.fromkeys(("q_ptr", "out_ptr"), kind)
    types |= dict.fromkeys(("keys_ptr", "values_ptr"), "*fp8e4nv" if fp8 else kind)
    types |= dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*fp32" if fp8 else kind)
    types |= {"columns_ptr": "*i64", "partials_ptr": "*fp32", "counters_ptr": "*i32"}
    types |= dict.fromkeys(("key_row", "key_head", "value_row", "value_head", "scale_row", "scale_head"), "i32!")
    types |= {"kv_heads": "i32", "scale": "fp32", "softcap": "fp32", "window": "i32"}
    block_d = 1 << (width - 1).bit_length()
    constants = {"GROUP": 4, "G": 16, "D": width, "BLOCK_D": block_d, "BLOCK": 64 if block_d <= 128 else 32}
    constants |= {"SHARE": 128, "MOST_SPLITS": 64, "SOFTCAP": softcap, "WINDOW": window, "FP8": fp8}
    constants["PDL"] = capability >= 90
    return compile_kernel(split_attention, types, constants, capability, 4)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (128, {}),
        (64, {"softcap": True, "window": True}),
        (256, {"kind": "*fp16"}),
        (128, {"fp8": True}),
        pytest.param(64, {"fp8": True, "window": True}, marks=pytest.mark.slow),
        pytest.param(80, {"window": True}, marks=pytest.mark.slow),
        pytest.param(128, {"capability": 80}, marks=pytest.mark.slow),
        pytest.param(128, {"capability": 100}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_attention(width, options):
    code = compile_attention(width, **options)
    assert not code.spills()
    assert code.registers <= 200
    able = options.get("capability", 90) >= 90
    assert code.waits_first(hints=1) == able  # the row's length, for what it prefetches
    assert len(code.place("UBLKPF.L2")) == (2 if able else 0)
    assert not able or max(code.place("UBLKPF.L2")) < code.place("ACQBULK")[0]
    assert code.shared_bytes <= 99 * 1024
    assert any(name.startswith(("LDGSTS.E.BYPASS.128", "LDG.E.128")) for name in code.instructions), code.instructions
    assert any(name.startswith(("HMMA", "HGMMA", "UTCHMMA")) for name in code.instructions)
    converts = any(name.startswith("F2FP.F16.E4M3.UNPACK") for name in code.instructions)
    assert converts == options.get("fp8", False)
    assert not any(name.startswith("F2F.") for name in code.instructions)  # a quarter of the speed, one at a time


def lets_the_next_start(code):
    """Before it waits, so that the product behind it has the time of both to fetch weights."""
    return code.waits_first() and code.place("PREEXIT") < code.place("ACQBULK")


@pytest.mark.parametrize("add", [False, True])
def test_norms(add):
    types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr"), "*bf16")
    types |= {"width": "i32!", "eps": "fp32", "offset": "fp32"}
    code = compile_kernel(rms_norm_rows, types, {"ADD": add, "ROUND": True, "BLOCK": 4096, "PDL": True}, 90, 8)
    assert not code.spills() and lets_the_next_start(code)
    assert any(name.startswith("LDG.E.128") for name in code.instructions)
    assert any(name.startswith("STG.E.128") for name in code.instructions)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("normed", "offset"), [(False, 0.0), (True, 0.0), (True, 1.0)])
def test_rotation(normed, offset, fp8):
    names = ("qkv", "cos", "sin", "q_norm", "k_norm", "q")
    types = {f"{name}_ptr": "*bf16" for name in names} | {"columns_ptr": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("keys_ptr", "values_ptr"), "*fp8e4nv" if fp8 else "*bf16")
    types |= dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*fp32")
    strides = ("stride_qkv", "key_row", "key_head", "value_row", "value_head", "scale_row", "scale_head")
    types |= dict.fromkeys(strides, "i32!") | {"heads": "i32", "kv_heads": "i32"}
    constants = {"D": 128, "BLOCK_D": 128, "ROTATE": True, "NORM": normed, "OFFSET": offset, "FP8": fp8, "PDL": True}
    code = compile_kernel(rotate_and_store, types, constants, 90, 1)
    assert not code.spills() and lets_the_next_start(code)
    assert code.place("FSETP.NAN") or not fp8, "a NaN that is stored as one"


@pytest.mark.parametrize("gelu", [False, True])
def test_gated_activation(gelu):
    types = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "width": "i32!"}
    code = compile_kernel(gated_rows, types, {"GELU": gelu, "BLOCK": 1024, "PDL": True}, 90, 4)
    assert not code.spills() and lets_the_next_start(code)
    assert any(name.startswith("LDG.E.128") for name in code.instructions)
