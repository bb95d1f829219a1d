"""Memory that the kernels borrow: partial sums and tickets of split K, or a dequantized matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """Scratch memory, allocated once for the largest use. It belongs to one stream.

    Two products on one stream may share it: the second starts after the first. Products on two streams would overwrite
    each other's partial sums, so each stream needs its own.

    buffer: uint8, its contents mean nothing between two calls.
    counters: int32, all zero between two calls; every kernel leaves them so.
    """

    buffer: Tensor
    counters: Tensor

    @classmethod
    def allocate(cls, buffer_bytes: int, counters: int, device: torch.device | str) -> "Workspace":
        """Memory for uses of up to buffer_bytes and so many output tiles."""
        return cls(
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The start of the buffer as a tensor.

        Raises:
            ValueError: the buffer is too small.
        """
        wanted = torch.Size(shape).numel() * dtype.itemsize
        if wanted > self.buffer.numel():
            raise ValueError(f"the workspace has {self.buffer.numel()} bytes, needs {wanted}; see workspace_bytes")
        return self.buffer[:wanted].view(dtype).view(shape)

    def tickets(self, count: int) -> Tensor:
        """The counters, at least so many.

        Raises:
            ValueError: there are fewer.
        """
        if count > self.counters.numel():
            raise ValueError(f"the workspace has {self.counters.numel()} counters, needs {count}; see workspace_bytes")
        return self.counters
