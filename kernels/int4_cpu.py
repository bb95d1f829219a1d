"""The int4 product on a CPU: torch's op, blocks dequantized in the cache, or a kept dense matrix: the fastest."""

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from qsun.kernels import int4pack_cpu
from qsun.kernels.bytes_product import bytes_input_grad, bytes_linear, reordered


def int4_linear(
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
    """Implement torch.ops.qsun.packed_linear on a CPU, where every weight takes 4 bits; qsun/runtime/ops.py has the
    schema."""
    rows = (x if order is None else x[..., order]).reshape(-1, x.shape[-1])
    M = rows.shape[0]
    if x.dtype == torch.bfloat16 and not (M and _dense_wins(M, dense)):
        product = int4pack_cpu.block_product if int4pack_cpu.blocks_win(M) else int4pack_cpu.packed_product
        y = product(rows.contiguous(), words, scales)
        y = y if bias is None else y.add_(bias)
    elif dense is not None:
        y = linear(rows, dense, bias)
    else:
        q, plain, zero = int4pack_cpu.unpack(words, scales, rows.shape[1], _groups(rows.shape[1], group_size))
        y = bytes_linear(rows, q, plain, zero, None, None, bias)
    if silu_mul:
        gate, up = y.chunk(2, -1)
        y = silu(gate).mul_(up)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if residual is None else y.add_(residual)


def int4_input_grad(
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
    if dense is not None:
        return reordered(grad @ dense, order)
    q, plain, zero = int4pack_cpu.unpack(words, scales, in_features, _groups(in_features, group_size))
    return reordered(bytes_input_grad(grad, q, plain, zero, None, None), order)


def _dense_wins(M: int, dense: Tensor | None) -> bool:
    return not int4pack_cpu.int4_wins(M) if dense is not None else int4pack_cpu.dequantizing_wins(M)


def _groups(in_features: int, group_size: int) -> int:
    return 1 if group_size == -1 else in_features // group_size
