"""The KV cache of a decode batch, whose rows come from different prefill modules."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel

# What transformers calls the cache in the forward of models and blocks: 5.24 renamed it.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

_GROWTH = 128  # columns


class DecodeCache:
    """Keys and values of B rows, aligned so that all rows write their next token into the same column.

    Layers with a sliding window keep all columns as well; the mask hides the old ones. This is one buffer for both
    uses: `static` hands attention the whole buffer and finds the column in a tensor, so that a captured CUDA graph can
    be replayed; otherwise attention sees the filled columns only, and the buffer grows.

    Args:
        like: a tensor of the decode model's dtype and device; what a prefill module of another one wrote is converted.

    Attributes:
        rows: B. columns: of the buffer. filled: columns in use. column: (1,) int64, the next column, on the device.
    """

    def __init__(self, rows: int, filled: int, columns: int, like: Tensor, static: bool):
        self.rows, self.filled, self.static, self._like = rows, filled, static, like
        self.columns = columns if static else min(columns, filled + _GROWTH)
        self.column = torch.tensor([filled], device=like.device)
        self.layers: list[tuple[Tensor, Tensor]] = []

    def place(self, row: int, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Put a row's prefilled keys and values, (heads, tokens, head_dim) by layer, before column `filled`."""
        for index, (keys, values) in enumerate(layers):
            if index == len(self.layers):
                self._add_layer(keys, values)
            for buffer, new in zip(self.layers[index], (keys, values), strict=True):
                buffer[row, :, self.filled - new.shape[1] : self.filled] = new

    def _add_layer(self, keys: Tensor, values: Tensor) -> None:
        shape, like = (self.rows, keys.shape[-3], self.columns), self._like
        self.layers.append((like.new_zeros(*shape, keys.shape[-1]), like.new_zeros(*shape, values.shape[-1])))

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by every attention layer: write one token a row, (B, heads, 1, head_dim), and return what to see."""
        if layer == len(self.layers):
            self._add_layer(keys, values)
        buffers = self.layers[layer]
        if self.static:
            for buffer, new in zip(buffers, (keys, values), strict=True):
                buffer.index_copy_(2, self.column, new)
            return buffers
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[:, :, self.filled] = new[:, :, 0]
        return buffers[0][:, :, : self.filled + 1], buffers[1][:, :, : self.filled + 1]

    def advance(self) -> None:
        """The token's column is written in every layer; make room for the next."""
        self.filled += 1
        self.column += 1
        if not self.static and self.filled == self.columns:
            self.columns += _GROWTH
            self.layers = [(_longer(keys), _longer(values)) for keys, values in self.layers]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; not for a static cache, whose shape a captured graph has in it."""
        self.rows = len(rows)
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]

    def get_seq_length(self, *_: Any) -> int:
        """Part of what transformers asks of a cache."""
        return self.filled

    get_query_offset = get_seq_length

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Columns that a step sees and the first of them: transformers asks where it is given no mask."""
        return (self.columns if self.static else self.filled + 1), 0


def _longer(buffer: Tensor) -> Tensor:
    rows, heads, _, width = buffer.shape
    return torch.cat([buffer, buffer.new_zeros(rows, heads, _GROWTH, width)], 2)
