"""int4 products on AVX-512 CPUs with bfloat16 instructions: blocks of weights are dequantized into the cache.

For batches beyond a few rows, where torch's int4 op is bound by its float32 arithmetic. llvmlite, which numba brings,
compiles `block_code` at first use: users need no compiler.
"""

import ctypes
import logging
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qsun.kernels.avx512.block_code import MOST_ROWS, write_block_code

logger = logging.getLogger(__name__)
BLOCK = 64  # rows of weights
_lock = threading.Lock()  # code that two threads compiled would be freed under one of them


@cache
def available() -> bool:
    """Return whether this CPU and the libraries installed can run `block_product`; compiles it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._is_avx512_bf16_supported():
        return False
    try:
        _compiled()
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # no llvmlite, one whose library cannot be loaded, no libgomp, or an LLVM of another age
        logger.info("int4 products on this CPU are torch's own: %s: %s", type(error).__name__, error)
        return False
    return True


def multiply_block(x: Tensor, words: Tensor, scale_zero: Tensor) -> Tensor:
    """Return x times the packed matrix in its first N // 64 * 64 columns; the others are not written.

    A row's result does not depend on the other rows of x, nor on the number of threads.

    Args:
        x: (M, K) bfloat16, contiguous.
        words, scale_zero: (N, K / 2) uint8 and (G, N, 2) bfloat16 from `int4pack_cpu.pack`, in blocks of 64 rows.
    Returns:
        (M, N) bfloat16, accumulated in float32.
    """
    out = x.new_empty(x.shape[0], words.shape[0])
    code, (groups, N) = _compiled(), scale_zero.shape[:2]
    K, blocks = x.shape[1], N // BLOCK
    threads = max(1, min(torch.get_num_threads(), blocks))
    for start in range(0, x.shape[0], MOST_ROWS):
        rows, target = x[start : start + MOST_ROWS], out[start : start + MOST_ROWS]
        addresses = [tensor.data_ptr() for tensor in (rows, words, scale_zero, target)]
        numbers = (0, len(rows), N, K, K // groups, blocks)
        code.run((ctypes.c_int64 * 10)(*addresses, *numbers), threads)
    return out


class _Compiled:
    """Machine code for this CPU; it lives as long as its engine."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        parallel: Any = ctypes.CDLL(None).GOMP_parallel  # torch has loaded it, libgomp's or Intel's
        llvm.add_symbol("GOMP_parallel", ctypes.cast(parallel, ctypes.c_void_p).value)
        module = llvm.parse_assembly(write_block_code())
        target = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, target)
        self._engine.finalize_object()
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)  # without the GIL
        self.run = signature(self._engine.get_function_address("run"))


def _compiled() -> _Compiled:
    with _lock:
        return _compiled_once()


@cache
def _compiled_once() -> _Compiled:
    return _Compiled()
