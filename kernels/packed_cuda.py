"""The product with packed weights on a GPU: the Triton kernels, their scratch memory, and inputs of another dtype."""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from qsun.kernels.bytes_product import bytes_input_grad, bytes_linear, reordered
from qsun.kernels.launch_table import dequantize_above_m, workspace_bytes
from qsun.kernels.layout import PackedWeights, separate_gate_up, unpack_weights
from qsun.kernels.workspace import reserve, reserved

logger = logging.getLogger(__name__)
_CAPABILITY = (8, 0)  # of a GPU that has bfloat16 in its tensor cores, and that Triton compiles for


@cache
def available(device: torch.device) -> bool:
    """Return whether the Triton kernels run on a CUDA device; where they do not, warn once and say why."""
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        problem = "its compute capability is {}.{}, below the {}.{} that they need".format(*capability, *_CAPABILITY)
    else:
        problem = _import_problem() or _launch_problem(device)
    if problem:
        logger.warning("%s computes without our Triton kernels, which is slower: %s", device, problem)
    return not problem


def _import_problem() -> str:
    """Return why the kernels cannot be imported; nothing where they can."""
    version = ""
    try:
        import triton

        version = triton.__version__
        from qsun.kernels import decode_cuda, lora_triton, packed_triton  # noqa: F401
    except (ImportError, AttributeError) as error:  # the latter is what an old Triton raises
        if not version:
            return f"triton cannot be imported ({error}); pip install triton"
        return f"Triton {version} is too old ({error}); use 3.5 or later, which comes with torch 2.9"
    return ""


def _launch_problem(device: torch.device) -> str:
    """Return why the smallest kernel cannot be compiled and launched on a device; nothing where it can."""
    from qsun.kernels.decode_cuda import rms_norm

    x = torch.ones(1, 16, dtype=torch.float16, device=device)
    try:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            rms_norm(x, x[0], 1.0)
    except Exception as error:  # of any type: subprocess, ptxas, the driver
        lines = str(error).splitlines() or [""]
        return (
            f"a first one failed ({type(error).__name__}: {lines[0]}); Triton needs a C compiler and Python's headers"
        )
    return ""


def packed_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    silu_mul: bool,
) -> Tensor:
    """Implement torch.ops.qsun.packed_linear on a GPU; qsun/runtime/ops.py has the schema."""
    rows = (x if order is None else x[..., order]).reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    wanted = (*x.shape[:-1], out_features // 2 if silu_mul else out_features)
    if x.dtype != scales.dtype:
        y = _other_dtype(rows, (words, scales, zeros), out_features, group_size, bits, bias, silu_mul)
        y = y.view(wanted)
        return y if residual is None else y.add_(residual)
    from qsun.kernels import packed_triton

    with torch.cuda.device_of(x):  # Triton launches on the current device
        y = packed_triton.packed_product(
            *(rows, words, scales, zeros, out_features, group_size, bits),
            bias=bias,
            residual=None if residual is None else residual.reshape(-1, wanted[-1]),
            silu_mul=silu_mul,
            workspace=reserved(x.device),
        )
    return y.view(wanted)


def packed_input_grad(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    dense: Tensor | None,
    in_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Return the gradient of the product's input: grad (..., N) times the dequantized weights."""
    N = grad.shape[-1]
    if grad.dtype == scales.dtype and grad.is_cuda:
        from qsun.kernels import packed_triton

        weight = torch.empty(N, in_features, dtype=grad.dtype, device=grad.device)
        with torch.cuda.device_of(grad):  # Triton launches on the current device
            packed_triton.packed_dequantize(words, scales, zeros, N, in_features, group_size, weight, bits)
        return reordered(grad @ weight, order)
    q, plain, zero = unpack_weights(PackedWeights(words, scales, zeros), N, in_features, group_size, bits)
    return reordered(bytes_input_grad(grad, q, plain.float(), zero, None, None), order)


def reserve_workspace(N: int, K: int, group_size: int, bits: int, device: torch.device) -> None:
    """Reserve the scratch memory that products with an (N, K) matrix need on a device."""
    from qsun.kernels.packed_triton import gpu_name

    limit = dequantize_above_m(gpu_name(device))
    reserve(device, *workspace_bytes(limit + 1, N, K, group_size, gpu_name(device), bits))


def _other_dtype(
    rows: Tensor,
    packed: tuple[Tensor, Tensor, Tensor | None],
    N: int,
    group_size: int,
    bits: int,
    bias: Tensor | None,
    silu_mul: bool,
) -> Tensor:
    """Multiply an input whose dtype differs from that of the packed scales."""
    q, scales, zeros = unpack_weights(PackedWeights(*packed), N, rows.shape[1], group_size, bits)
    y = bytes_linear(rows, q, scales.float(), zeros, None, None, bias)
    if silu_mul:
        gate, up = separate_gate_up(y.t())
        y = (silu(gate) * up).t().contiguous()
    return y
