"""The loops over columns that no matrix product can do: compiled by numba for a CPU, by Triton for a GPU.

Matrices are transposed, (K, N): a column of weights is one run of memory, and rows, which never depend on each other,
are the innermost and only parallel dimension. The order of every sum is that of the code, so neither the number of
threads nor a second run changes a bit.
"""

import logging
from functools import cache
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from qsun.quantization.methods import torch_loops

logger = logging.getLogger(__name__)


class Loops(Protocol):
    """What `torch_loops` defines and `compiled_loops` computes too."""

    def least_error(self, weight: Tensor, scales: Tensor, zeros: Tensor, importance: Tensor, top: int) -> Tensor:
        """Return the candidate with the least weighted squared error of each group, the first of equals.

        Args:
            weight: (N, K) float32.
            scales, zeros: (C, N, G) float32, C candidates.
            importance: (K,) float32 weight of a squared error in each column.
        Returns:
            (N, G) int64, below C.
        """

    def round_columns(
        self, block: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
    ) -> tuple[Tensor, Tensor]:
        """Quantize columns one after another, each error absorbed by the columns after it.

        Args:
            block: (B, N) float32, contiguous; not changed.
            factor: (B, B) upper triangle.
            scales, zeros: (G, N) float32.
            groups: (B,) int64, each column's row of `scales`.
        Returns:
            Integers and errors, (B, N) float32; an error is divided by its diagonal of `factor`.
        """

    def descend_columns(
        self,
        state: tuple[Tensor, Tensor, Tensor, Tensor],
        pull: Tensor,
        hessian: Tensor,
        size: int,
        rounding: tuple[int, torch.dtype],
    ) -> Tensor:
        """Move every integer of a block to its best value, then refit the scales of the groups inside it.

        Args:
            state: integers and weights (B, N), scales and zeros (groups, N), float32; changed in place, zeros apart.
            pull: (B, N), H (W - Q)^T of these columns; not changed.
            hessian: (B, B) of these columns.
            size: columns in a group. Where it exceeds B, `scales` is the one that all share, and is not refitted.
            rounding: the largest integer, and the dtype of scales.
        Returns:
            (B, N), the weights before minus those after.
        """


def loops_on(device: torch.device) -> Loops:
    """Return the fastest loops that this device has."""
    compiled = _compiled() if device.type == "cpu" else _on_gpu(device) if device.type == "cuda" else None
    return cast(Loops, compiled or torch_loops)


@cache
def _compiled() -> ModuleType | None:
    try:
        from qsun.quantization.methods import compiled_loops
    except ImportError:  # numba lags behind new versions of Python
        return None
    return compiled_loops


@cache
def _on_gpu(device: torch.device) -> ModuleType | None:
    one, group = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        from qsun.quantization.methods import triton_loops

        triton_loops.round_columns(one, one, one, one, group, 1)
    except Exception as error:  # of any type: no Triton, or an old one; no C compiler; ptxas; the driver
        lines = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
        logger.warning("passes on %s loop over columns in torch, which is slower, as Triton failed: %s", device, reason)
        return None
    return triton_loops
