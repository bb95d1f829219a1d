"""Activation-ordered groups as a permutation: kernels read groups of adjacent columns."""

import torch
from torch import Tensor

from qsun.kernels.reference import group_index
from qsun.model.quantized import Quantized


def by_group(weights: Quantized) -> tuple[Quantized, Tensor | None]:
    """Sort columns into contiguous groups where all have one size; also return the order of the columns."""
    if weights.g_idx is None:
        return weights, None
    G, K = weights.scales.shape[0], weights.q.shape[1]
    if K % G or not bool((torch.bincount(weights.g_idx.long(), minlength=G) == K // G).all()):
        return weights, None
    order = torch.argsort(weights.g_idx.long(), stable=True)
    return Quantized(weights.q[:, order], weights.scales, weights.zeros), order


def in_order(weights: Quantized, order: Tensor | None) -> Quantized:
    """Invert `by_group`."""
    if order is None:
        return weights
    K, G = weights.q.shape[1], weights.scales.shape[0]
    q, g_idx = torch.empty_like(weights.q), torch.empty(K, dtype=torch.int32, device=order.device)
    q[:, order] = weights.q
    g_idx[order] = group_index(K, G, order.device)
    return Quantized(q, weights.scales, weights.zeros, g_idx)
