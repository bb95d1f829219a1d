"""An adapter in memory."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsun.model.lora import Adapter


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter's lora_A (rank, in) and scale * lora_B, transposed (rank, out), by the name of their layer."""

    layers: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> "AdapterWeights":
        """Return an adapter in the dtype that its model computes in; the scale enters before B is rounded."""
        scale = adapter.settings.scale
        return cls(
            {
                layer: (a.to(device, dtype), (b.to(device, torch.float32) * scale).to(dtype).t().contiguous())
                for layer, (a, b) in adapter.weights.items()
            }
        )

    @cached_property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for pair in self.layers.values() for tensor in pair)

    @cached_property
    def most_rank(self) -> int:
        return max(a.shape[0] for a, _ in self.layers.values())


Run = tuple[slice, AdapterWeights]  # rows side by side that have the same adapter
