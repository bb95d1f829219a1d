"""The machine code of the passes' loops over columns, without a GPU: changes stay in registers, divisions are exact."""

import pytest

pytest.importorskip("triton")

from qsun.quantization.methods.triton_loops import move_block, round_block
from tests.kernels.offline import compile_kernel

POINTERS = {
    round_block: {"block": "*fp32", "factor": "*fp32", "groups": "*i64", "errors": "*fp32"},
    move_block: {"quantized": "*fp32", "pull": "*fp32", "hessian": "*fp32", "changes": "*fp32"},
}


@pytest.mark.parametrize("kernel", POINTERS, ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("capability", [80, 90])
def test_loops_over_columns(kernel, capability):
    types = {f"{name}_ptr": kind for name, kind in POINTERS[kernel].items()}
    types |= dict.fromkeys(("integers_ptr", "scales_ptr", "zeros_ptr"), "*fp32")
    types |= {"columns": "i32!", "rows": "i32!", "size": "i32!", "top": "fp32"}
    code = compile_kernel(kernel, types, {"B": 128, "R": 16}, capability, 2)
    assert not code.spills()
    assert code.registers <= 168
    assert code.place("MUFU.RCP"), "a division"
