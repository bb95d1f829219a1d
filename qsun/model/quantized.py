"""A weight matrix as integers, and the digest of what it computes with."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from qsun.kernels.reference import dequantize


class Quantized(NamedTuple):
    """A weight matrix as integers: q (N, K) uint8; scales float32 and zeros uint8, (G, N); g_idx (K,) int32 or None."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the (N, K) weights."""
        return dequantize(self.q, self.scales, self.zeros, self.g_idx, dtype)

    def to(self, device: torch.device) -> "Quantized":
        """Return a copy on a device."""
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return Quantized(self.q.to(device), self.scales.to(device), self.zeros.to(device), g_idx)

    def split(self, rows: list[int]) -> "list[Quantized]":
        """Return matrices of so many rows each, copies; the inverse of stacking them."""
        parts = zip(self.q.split(rows), self.scales.split(rows, 1), self.zeros.split(rows, 1), strict=True)
        return [Quantized(q.clone(), s.contiguous(), z.contiguous(), self.g_idx) for q, s, z in parts]


def digest(weights: Quantized) -> str:
    """Return a SHA-256 of what a layer computes with, the same in every format."""
    sha = hashlib.sha256()
    for tensor in (weights.q, weights.scales.float(), weights.zeros):
        sha.update(tensor.contiguous().cpu().numpy().tobytes())
    if weights.g_idx is not None:
        sha.update(weights.g_idx.cpu().numpy().tobytes())
    return sha.hexdigest()
