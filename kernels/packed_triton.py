"""Products with packed weights and their dequantization on a GPU, from tensors to tensors.

On a CPU the same kernels run in Triton's interpreter (TRITON_INTERPRET=1), in float16 and float32 only: its bfloat16 is
wrong.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from qsun.kernels.fields_triton import dequantize_tiles
from qsun.kernels.launch_table import (
    KernelLaunch,
    choose_launch,
    dequantize_above_m,
    load_launch_table,
    product_workspace_bytes,
)
from qsun.kernels.layout import INTERLEAVED_ROWS, ROWS, TILES, ceil_div, padded_rows, tile_group
from qsun.kernels.matmul_triton import packed_matmul
from qsun.kernels.workspace import Workspace

_INTERPRETED = not isinstance(packed_matmul, triton.runtime.JITFunction)


def packed_product(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int = 4,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    workspace: Workspace | None = None,
    launch: KernelLaunch | None = None,
) -> Tensor:
    """``x @ w.T + bias``, then SiLU(gate) * up, then ``+ residual``, in float32 with one rounding at the end.

    The same input gives the same bits: sums have a fixed order, and no atomic touches data. With a workspace the call
    allocates only its result, never synchronizes, and can be captured in a CUDA graph. A result that depends on an
    infinite x may be NaN.

    Args:
        x: (M, in_features) bfloat16 or float16, columns contiguous.
        words, scales, zeros: of layout.PackedWeights, scales and zeros in the dtype of x.
        out_features: N, a multiple of 16.
        group_size: 32, 64, 128, a multiple of 128, or -1; in_features is a multiple of 32.
        bits: of a weight: 2, 3, 4 or 8.
        bias: (N,).
        residual: (M, N), contiguous; with silu_mul (M, N / 2).
        silu_mul: gate and up rows alternate as layout.interleave_gate_up arranges them.
        workspace: of one stream, at least launch_table.workspace_bytes; None allocates one for this call.
        launch: instead of the table's choice, for tuning.
    Returns:
        (M, N), or (M, N / 2) with silu_mul, in the dtype of x. Above the table's dequantize_above_m rows, the weights
        are dequantized into the workspace and torch multiplies; weights and product are then rounded to the dtype of x.
    Raises:
        ValueError: incompatible shapes, dtypes or devices.
    """
    N, (M, K) = out_features, x.shape
    _check(x, words, scales, zeros, N, group_size, bits)
    wanted = (M, N // 2 if silu_mul else N)
    _check_epilogue(wanted, N, bias, residual)
    gpu = gpu_name(x.device)
    if launch is None and dequantize_above_m(gpu) < M:
        space = workspace or Workspace.allocate(2 * N * K, 0, x.device)
        weight = packed_dequantize(words, scales, zeros, N, K, group_size, space.view((N, K), x.dtype), bits)
        return _dense_linear(x, weight, bias, residual, silu_mul)
    y = torch.empty(wanted, dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    launch = launch or choose_launch(M, N, K, group_size, gpu, bits)
    grid = ceil_div(N, launch.block_n), launch.split_k, ceil_div(M, launch.block_m)
    partial_bytes, tickets = product_workspace_bytes(M, N, launch)
    space = workspace or Workspace.allocate(partial_bytes, tickets, x.device)
    scratch = space.view((partial_bytes // 4,), torch.float32), space.tickets(tickets)
    weights = (words, scales, scales if zeros is None else zeros)
    epilogue = (x if bias is None else bias, x if residual is None else residual)  # absent ones are never read
    packed_matmul[grid](
        *(x, *weights, *epilogue, y, *scratch),
        *(M, N, K, padded_rows(N), x.stride(0), launch.ahead(bits)),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        SILU=y.shape[1] != N,
        **_constants(K, group_size, bits, x.dtype, zeros is not None, launch),
        **pdl_options(x.device),
    )
    return y


def compile_product(
    N: int, K: int, group_size: int, bits: int, dtype: torch.dtype, asym: bool, launch: KernelLaunch
) -> None:
    """Compile what `packed_product` without an epilogue launches on the current device, into Triton's cache."""
    pointers = (dtype, torch.int16, *[dtype] * 5, torch.float32, torch.int32)
    packed_matmul.warmup(
        *(*pointers, launch.block_m, N, K, padded_rows(N), K, launch.ahead(bits)),
        grid=(1, 1, 1),
        BIAS=False,
        RESIDUAL=False,
        SILU=False,
        **_constants(K, group_size, bits, dtype, asym, launch),
        **pdl_options(torch.device("cuda", torch.cuda.current_device())),
    )


def packed_dequantize(
    words: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int, group_size: int, out: Tensor, bits: int = 4
) -> Tensor:
    """Write ``(q - zero) * scale``, rounded once, to out (N, K), contiguous, in the dtype of scales; returns out.

    Raises:
        ValueError: incompatible shapes, dtypes or devices.
    """
    _check(out, words, scales, zeros, N, group_size, bits)
    if tuple(out.shape) != (N, K) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}, strides {out.stride()}; want ({N}, {K}), contiguous")
    dequantize_tiles[words.shape[0], words.shape[1]](
        *(words, scales, scales if zeros is None else zeros, out, N, K, padded_rows(N)),
        BITS=bits,
        GROUP=tile_group(group_size, K),
        ASYM=zeros is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _constants(
    K: int, group_size: int, bits: int, dtype: torch.dtype, asym: bool, launch: KernelLaunch
) -> dict[str, Any]:
    """Return what a product is compiled for, without its epilogue."""
    return {
        "BITS": bits,
        "GROUP": tile_group(group_size, K),
        "BF16": dtype != torch.float16,  # the interpreter runs bfloat16's algebra in float32
        "ASM": not _INTERPRETED,
        "ASYM": asym,
        "EVEN_K": K % (launch.tiles * TILES[bits].columns) == 0,
        "BN": launch.block_n,
        "B": launch.block_m,
        "SPLIT_K": launch.split_k,
        "FOLD": launch.fold,
        "TILES": launch.tiles,
        "STAGES": launch.stages,
        "num_warps": launch.warps,
        "enable_fp_fusion": True,  # Triton 3.10 changes the default
    }


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_mul: bool) -> Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    if silu_mul:
        gate, up = y.view(x.shape[0], -1, 2, INTERLEAVED_ROWS).unbind(2)
        y = (torch.nn.functional.silu(gate) * up).view(x.shape[0], -1)
    return y if residual is None else y.add_(residual)


def _check(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, N: int, group_size: int, bits: int) -> None:
    """Raise ValueError where x, or another (..., K) tensor of the product's dtype, does not match the weights."""
    K, tile = x.shape[1], TILES[bits]
    group = tile_group(group_size, K)
    tiles = ceil_div(K, tile.columns)
    dtypes = (torch.float16, torch.float32) if _INTERPRETED else (torch.float16, torch.bfloat16)
    if x.dtype not in dtypes or x.stride(1) != 1:
        raise ValueError(
            f"x is {x.dtype} with strides {x.stride()}; want {dtypes[0]} or {dtypes[1]}, columns contiguous"
        )
    if x.is_cuda == _INTERPRETED or x.device != words.device:
        raise ValueError(f"x is on {x.device}, words on {words.device}; the kernels need both on one CUDA device")
    if N % 16 or tuple(words.shape) != (padded_rows(N) // ROWS, tiles, ROWS, tile.words) or words.dtype != torch.int16:
        raise ValueError(
            f"words {tuple(words.shape)} {words.dtype} do not hold ({N}, {K}) of {bits} bits; "
            "want pack_weights' and N a multiple of 16"
        )
    wanted = (tiles * (tile.columns // group) if group else 1, padded_rows(N))
    for name, values in (("scales", scales), ("zeros", scales if zeros is None else zeros)):
        if tuple(values.shape) != wanted or values.dtype != x.dtype or not values.is_contiguous():
            raise ValueError(f"{name} are {tuple(values.shape)} {values.dtype}; want {wanted} {x.dtype}, contiguous")


def _check_epilogue(wanted: tuple[int, int], N: int, bias: Tensor | None, residual: Tensor | None) -> None:
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"bias is {tuple(bias.shape)}; want ({N},)")
    if residual is not None and (tuple(residual.shape) != wanted or not residual.is_contiguous()):
        raise ValueError(f"residual is {tuple(residual.shape)}; want {wanted}, contiguous")


@lru_cache(maxsize=64)
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Return the options of a kernel that starts while the one before it ends (programmatic dependent launch).

    From compute capability 9.0 on, unless the GPU's launch table turns it off.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    wanted = able and load_launch_table(gpu_name(device)).dependent_launch
    return {"PDL": True, "launch_pdl": True} if wanted else {"PDL": False}


@lru_cache(maxsize=64)
def gpu_name(device: torch.device) -> str:
    """Return the name under which launch tables list a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"
