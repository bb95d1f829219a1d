"""Memory of decode batches of fixed shapes: its addresses never change, so graphs over it outlive the batch.

A model's memory is lent to one batch at a time. The next one, of another engine or call of `generate`, takes it over
with the graphs that were captured.
"""

import threading
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from qsun.memory import available_bytes
from qsun.model.architectures import kv_shape
from qsun.runtime.kv_cache import kv_tensors

_lock = threading.Lock()
_of_models: "WeakKeyDictionary[Any, list[SlotMemory]]" = WeakKeyDictionary()


class SlotMemory:
    """Keys and values of up to `tokens` rows x columns in all layers, and what a step's graphs read and write.

    Attributes:
        layers: what a cache holds of each, flat. lengths, fed: see SlotCache; one for each row there could be.
        graphs: by (rows, columns of the buffers, columns seen), each with its logits.
    """

    def __init__(self, model: Any, tokens: int, rows: int, kv_dtype: str):
        like = model.model.embed_tokens.weight
        count, self._heads, width = kv_shape(model.config)
        self.tokens, self.rows, self.kv_dtype = tokens, rows, kv_dtype
        self._tensors = kv_tensors(width, like.dtype, kv_dtype)
        sizes = [(tokens * self._heads * each, dtype) for each, dtype in self._tensors]
        self.layers = [tuple(like.new_zeros(size, dtype=dtype) for size, dtype in sizes) for _ in range(count)]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.fed = self.lengths.new_zeros(rows, 1)
        self.graphs: dict[tuple[int, int, int], tuple[Any, Tensor]] = {}
        self._starts: dict[int, Tensor] = {}
        self._logits: Tensor | None = None
        self._addresses = _addresses(model)
        self._owner: Any = lambda: None

    def buffers(self, rows: int, columns: int) -> list[tuple[Tensor, ...]]:
        """Return each layer's tensors as (rows, heads, columns, their last dimension)."""
        shapes = [(rows, self._heads, columns, width) for width, _ in self._tensors]
        return [
            tuple(flat[: torch.Size(shape).numel()].view(shape) for flat, shape in zip(layer, shapes, strict=True))
            for layer in self.layers
        ]

    def starts(self, columns: int) -> Tensor:
        """Return (rows, heads): where each head's columns start in flat buffers of this many columns."""
        if columns not in self._starts:
            numbers = torch.arange(self.rows * self._heads, device=self.lengths.device)
            self._starts[columns] = numbers.view(self.rows, self._heads) * columns
        return self._starts[columns]

    def logits(self, like: Tensor) -> Tensor:
        """Return memory for logits such as these, which all graphs share; they hold until the next replay."""
        if self._logits is None or self._logits.shape[0] < like.shape[0]:
            self._logits = torch.empty_like(like)  # graphs of fewer rows keep the one before
        return self._logits[: like.shape[0]]

    def logits_of(self, rows: int) -> Tensor:
        """Return the same, once the first step has been run."""
        assert self._logits is not None
        return self._logits[:rows]

    def fits(self, model: Any, tokens: int, rows: int, kv_dtype: str) -> bool:
        """Return whether a batch of this size can have it, and its graphs hold the model's present weights."""
        free = self._owner() is None and self.tokens >= tokens and self.rows >= rows
        return free and self.kv_dtype == kv_dtype and self._addresses == _addresses(model)

    def lend_to(self, owner: object) -> None:
        """Give it to a batch, for as long as that exists; it finds zeros."""
        self._owner = ref(owner)
        for tensor in chain([self.lengths, self.fed], *self.layers):
            tensor.zero_()  # a mask does not hide what is NaN


def lend_memory(model: Any, tokens: int, rows: int, kv_dtype: str, owner: object) -> SlotMemory:
    """Return memory of at least this size for `owner` alone: what an earlier batch left, or new."""
    with _lock:
        held = _of_models.setdefault(model, [])
        found = next((memory for memory in held if memory.fits(model, tokens, rows, kv_dtype)), None)
        if found is None:
            held[:] = [memory for memory in held if memory._owner() is not None]  # smaller: its room is needed
            found = SlotMemory(model, tokens, rows, kv_dtype)
            held.append(found)
        found.lend_to(owner)
        return found


def free_tokens(model: Any, kv_dtype: str = "auto") -> int:
    """Return how many rows x columns the largest memory has that an earlier batch of this model left; 0: none."""
    with _lock:
        held = [memory for memory in _of_models.get(model, []) if memory.kv_dtype == kv_dtype]
        return max((memory.tokens for memory in held if memory._owner() is None), default=0)


def available_after_release(device: torch.device) -> int:
    """Return what is free on a device once no memory waits for a next batch, of whichever model; see `release`."""
    release()
    return available_bytes(device)


def release() -> None:
    """Free the memory that no batch has, of all models: keys and values, and graphs, that calls of `generate` left."""
    with _lock:
        for held in _of_models.values():
            held[:] = [memory for memory in held if memory._owner() is not None]
    torch.cuda.empty_cache()  # without it the device does not know that they are free


def _addresses(model: Any) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
