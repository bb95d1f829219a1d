"""Muon, batched over matrices of one shape, in float32.

`torch.optim.Muon` gives the same kind of update, but iterates matrix by matrix in bfloat16. On a CPU without
bfloat16 units that cost three times the forward and backward passes together (0.58 s against 0.19 s). Here the few
distinct shapes of a Llama are stacked and orthogonalized together, in 0.05 s.
Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 4


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix towards 1 by Newton-Schulz iterations.

    Args:
        matrices: (B, M, N) float32.
    Returns:
        (B, M, N); most singular values lie between 0.7 and 1.2.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class BatchedMuon:
    """Nesterov momentum whose update is orthogonalized, for two-dimensional hidden weights."""

    def __init__(self, parameters: Iterable[Parameter], *, weight_decay: float = 0.01) -> None:
        self.weight_decay = weight_decay
        self._groups: dict[tuple[int, ...], list[Parameter]] = {}
        for parameter in parameters:
            self._groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self._momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, *, lr: float, momentum: float) -> None:
        """Apply one update from the gradients that the parameters hold."""
        for shape, group in self._groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self._momenta[shape].lerp_(gradient, 1 - momentum)
            update = orthogonalize(gradient.lerp(buffer, momentum))
            # Rows beyond the number of columns cannot be orthonormal; this restores their size.
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - lr * self.weight_decay).add_(direction, alpha=-lr * scale)
