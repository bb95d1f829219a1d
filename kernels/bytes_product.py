"""Products with weights of one byte each, any bits and shape, dequantized block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from qsun.kernels.reference import dequantize

_CHUNK_ELEMENTS = 1 << 20  # weights dequantized at a time where no dense matrix is kept


def bytes_linear(
    x: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return (..., N): x (..., K) times the weights q (N, K), or times their dense copy where one is kept."""
    if dense is not None:
        return linear(x, dense, bias)
    pieces = [linear(x, weight) for _, weight in _row_blocks(q, scales, zeros, g_idx, x.dtype)]
    y = torch.cat(pieces, -1)
    return y if bias is None else y.add_(bias)


def bytes_input_grad(
    grad: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, dense: Tensor | None
) -> Tensor:
    """Return (..., K): grad (..., N) times the dequantized weights."""
    if dense is not None:
        return grad @ dense
    total = grad.new_zeros((*grad.shape[:-1], q.shape[1]))
    for rows, weight in _row_blocks(q, scales, zeros, g_idx, grad.dtype):
        total += grad[..., rows] @ weight
    return total


def _row_blocks(
    q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield dequantized rows, a block at a time; the product of integer and scale is rounded once."""
    N, K = q.shape
    precise = torch.promote_types(dtype, torch.float32)
    step = max(1, _CHUNK_ELEMENTS // K)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        yield rows, dequantize(q[rows], scales[:, rows], zeros[:, rows], g_idx, precise).to(dtype)


def reordered(grad: Tensor, order: Tensor | None) -> Tensor:
    """Turn the gradient of x[..., order] into that of x."""
    if order is None:
        return grad
    restored = torch.empty_like(grad)
    restored[..., order] = grad
    return restored
