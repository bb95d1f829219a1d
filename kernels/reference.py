"""The definition of a quantized matrix in plain torch, for any bits, group and zero point.

Every kernel and every file format is tested against it, so it has no packing and no fused steps, and works in any
floating dtype (float64 for oracles).
"""

import torch
from torch import Tensor


def group_index(in_features: int, groups: int, device: torch.device | None = None) -> Tensor:
    """Return the group of each input column where groups are contiguous: (in_features,) int32."""
    return (torch.arange(in_features, device=device) // (in_features // groups)).to(torch.int32)


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantize a linear layer: ``w = (q - zero) * scale``.

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
