"""Scratch memory of the kernels: partial sums and tickets of split K, or a dequantized matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

_of_devices: dict[torch.device, list["Workspace"]] = {}


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of one stream, allocated once for the largest product.

    Products on one stream run in order and share it. Products on two streams would overwrite each other's partial sums,
    so each stream needs its own.

    buffer: uint8, meaningless between two calls.
    counters: int32, all zero between two calls; every kernel resets them.
    """

    buffer: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, buffer_bytes: int, counters: int, device: torch.device | str) -> "Workspace":
        """Allocate memory for uses of up to buffer_bytes and as many output tiles as counters."""
        return cls(
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the start of the buffer as a tensor.

        Raises:
            ValueError: the buffer is too small.
        """
        wanted = torch.Size(shape).numel() * dtype.itemsize
        if wanted > self.buffer.numel():
            raise ValueError(f"the workspace has {self.buffer.numel()} bytes, needs {wanted}; see workspace_bytes")
        return self.buffer[:wanted].view(dtype).view(shape)

    def tickets(self, count: int) -> Tensor:
        """Return the counters, at least `count` of them.

        Raises:
            ValueError: the workspace has fewer.
        """
        if count > self.counters.numel():
            raise ValueError(f"the workspace has {self.counters.numel()} counters, needs {count}; see workspace_bytes")
        return self.counters


def reserve(device: torch.device, buffer_bytes: int, counters: int) -> Workspace:
    """Return the workspace of a device, allocated anew where it is too small.

    Each device has one, so the kernels of one device must run on one stream at a time. Outgrown workspaces stay alive:
    a CUDA graph may hold their addresses.
    """
    held = _of_devices.setdefault(device, [])
    if held:
        buffer_bytes = max(buffer_bytes, held[-1].buffer.numel())
        counters = max(counters, held[-1].counters.numel())
    if not held or (buffer_bytes, counters) != (held[-1].buffer.numel(), held[-1].counters.numel()):
        held.append(Workspace.allocate(buffer_bytes, counters, device))
    return held[-1]


def reserved(device: torch.device) -> Workspace | None:
    """Return the workspace of a device, if it has one."""
    held = _of_devices.get(device)
    return held[-1] if held else None
