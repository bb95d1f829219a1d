"""The low-rank products of all adapters of a pass on a GPU: two kernel launches a layer, whatever the adapters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qsun.adapters.adapter_weights import AdapterWeights, Run
from qsun.kernels import packed_cuda

if TYPE_CHECKING:
    from qsun.kernels.lora_triton import RowTiles


class GroupedProducts:
    """Adds what the adapters of one pass add to each layer.

    Args:
        layers: names of all layers that an adapter may have.
    """

    def __init__(self, layers: Sequence[str]):
        self._numbers = {name: number for number, name in enumerate(layers)}
        self._entries: WeakKeyDictionary[AdapterWeights, Tensor] = WeakKeyDictionary()
        self._runs: Sequence[Run] = ()
        self._tiles: dict[int, RowTiles] = {}
        self._table: Tensor | None = None

    @staticmethod
    def serves(runs: Sequence[Run], device: torch.device) -> bool:
        """Return whether there is a kernel for these adapters on a device."""
        if not runs or device.type != "cuda" or not packed_cuda.available(device):
            return False
        from qsun.kernels.lora_triton import MOST_RANK

        return max(adapter.most_rank for _, adapter in runs) <= MOST_RANK

    @staticmethod
    def warm(rank: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what passes launch where this is the largest rank of their adapters, if there is a kernel for it."""
        if device.type != "cuda" or not packed_cuda.available(device):
            return
        from qsun.kernels.lora_triton import MOST_RANK, warm_lora_rows

        if rank <= MOST_RANK:
            with torch.cuda.device(device):
                warm_lora_rows(rank, dtype, device)

    def begin(self, runs: Sequence[Run]) -> None:
        """Take the adapters of the next pass, on one device; none: let go of the last one's, perhaps evicted."""
        self._runs, self._tiles = runs, {}
        self._table = torch.stack([self._entries_of(adapter) for _, adapter in runs]) if runs else None

    def _entries_of(self, adapter: AdapterWeights) -> Tensor:
        """Return (layers, 3): where the kernels find each layer of an adapter. Its tensors stay where they are."""
        if adapter not in self._entries:
            from qsun.kernels.lora_triton import table_entry

            layers = adapter.layers
            entries = [table_entry(*layers[name]) if name in layers else (0, 0, 0) for name in self._numbers]
            device = next(iter(layers.values()))[0].device
            self._entries[adapter] = torch.tensor(entries, dtype=torch.int64, device=device)
        return self._entries[adapter]

    def add(self, y: Tensor, x: Tensor, layer: str) -> None:
        """Add to a layer's output y (B, T, out), in place, what the adapters make of its input x (B, T, in)."""
        from qsun.kernels.lora_triton import add_lora_rows

        assert self._table is not None
        rows = y.view(-1, y.shape[-1])
        with torch.cuda.device_of(x):  # Triton launches on the current device
            add_lora_rows(rows, x.flatten(0, 1), self._table[:, self._numbers[layer]], self._tiles_for(x))

    def _tiles_for(self, x: Tensor) -> "RowTiles":
        from qsun.kernels.lora_triton import row_tiles

        columns = x.shape[1]
        if columns not in self._tiles:
            segments = [(rows.start * columns, rows.stop * columns) for rows, _ in self._runs]
            self._tiles[columns] = row_tiles(segments, max(a.most_rank for _, a in self._runs), x.device)
        return self._tiles[columns]
