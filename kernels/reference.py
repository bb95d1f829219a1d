"""The plain torch truth of a quantized matrix, for any bits, group and zero point.

Every kernel and every file format is tested against these few lines, so they stay free of tricks: no packing, no
fused steps, and any floating dtype (float64 for oracles).
"""

import torch
from torch import Tensor


def group_index(in_features: int, groups: int, device: torch.device | None = None) -> Tensor:
    """Group of each input column when groups are contiguous: (in_features,) int32."""
    return (torch.arange(in_features, device=device) // (in_features // groups)).to(torch.int32)


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights of a quantized linear layer: ``w = (q - zero) * scale``.

    Args:
        q: (N, K) uint8.
        scales: (G, N) floating.
        zeros: (G, N) integers.
        g_idx: (K,) group of each column, or None for contiguous groups of K / G.
        dtype: of the result; the product is taken in it.
    Returns:
        (N, K) weights.
    """
    if g_idx is not None:
        columns = g_idx.long()
        zero, scale = zeros.to(dtype)[columns].t(), scales.to(dtype)[columns].t()
        return (q.to(dtype) - zero) * scale
    N, K = q.shape
    grouped = q.to(dtype).reshape(N, scales.shape[0], -1)
    return ((grouped - zeros.to(dtype).t()[..., None]) * scales.to(dtype).t()[..., None]).reshape(N, K)


def quant_matmul(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> Tensor:
    """``x @ w.T`` with the weights dequantized in the dtype of x. x: (..., K); result: (..., N)."""
    return x @ dequantize(q, scales, zeros, g_idx, x.dtype).t()
