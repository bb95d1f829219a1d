"""The packed product as its launcher calls it, for compiling without a GPU."""

from qsun.kernels.layout import TILES
from qsun.kernels.matmul_triton import packed_matmul
from tests.kernels.offline import compile_kernel

_POINTERS = ("x", "scales", "zeros", "bias", "residual", "y")


def compile_product(launch, bits, group, asym, *, bf16=True, epilogue="br", even_k=True, capability=90, pdl=None):
    """Machine code of packed_matmul.

    Args:
        launch: launch_table.KernelLaunch.
        group: 32, 64, 128, or 0 for one group a row.
        pdl: whether it waits for the kernel before it; None: where the GPU can.
        epilogue: any of the letters b(ias), r(esidual), s(ilu_mul).
    """
    types = {f"{name}_ptr": "*bf16" if bf16 else "*fp16" for name in _POINTERS}
    types |= {"words_ptr": "*i16", "partials_ptr": "*fp32", "counters_ptr": "*i32"}
    types |= {"M": "i32", "N": "i32!", "K": "i32!", "padded_n": "i32!", "stride_x": "i32!", "ahead": "i32"}
    constants = {
        "BITS": bits,
        "BN": launch.block_n,
        "B": launch.block_m,
        "GROUP": group,
        "SPLIT_K": launch.split_k,
        "BF16": bf16,
        "ASM": True,
        "ASYM": asym,
        "FOLD": launch.fold,
        "BIAS": "b" in epilogue,
        "RESIDUAL": "r" in epilogue,
        "SILU": "s" in epilogue,
        "EVEN_K": even_k,
        "TILES": launch.tiles,
        "STAGES": launch.stages,
        "PDL": capability >= 90 if pdl is None else pdl,
    }
    return compile_kernel(packed_matmul, types, constants, capability, launch.warps)


def lane_instructions(code, launch, bits):
    """Of one weight in the main loop."""
    return code.lane_instructions(launch.warps, launch.block_n * launch.tiles * TILES[bits].columns)


def assert_well_compiled(code, bits=4, capability=90):
    """No spills, wide loads, tensor cores, no conversion of integers."""
    # Bits other than 4, and sm_100: ptxas may save an address, to reach a round number of registers.
    assert code.in_loop("STL") == 0
    assert code.in_loop("LDL") == 0 or capability == 100  # where the loop is not found
    assert code.stack_bytes <= (0 if bits == 4 and capability != 100 else 16)
    assert code.shared_bytes <= 99 * 1024  # what every GPU since sm_80 gives; two programs a processor on sm_90
    assert code.in_loop("LDGSTS.E.BYPASS.128") + code.in_loop("LDG.E.128") > 0, code.loop
    assert code.in_loop("HMMA") + code.in_loop("HGMMA") + code.in_loop("UTCHMMA") > 0, code.loop
    assert code.in_loop("I2F") == 0, code.loop
