"""Gradient checkpointing that keeps the KV cache.

transformers' own drops the cache in training, which would cut the prefill module off from the loss. Here each block
returns its K and V and is recomputed in the backward pass; the cache is filled outside of what is recomputed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.prefill_pass import Complete, completes


@contextmanager
def recomputed(*models: Any) -> Iterator[None]:
    """Make forward passes of these models keep only what enters and leaves each block, and its K and V."""
    layers = [(index, layer) for model in models for index, layer in enumerate(model.model.layers)]
    for index, layer in layers:
        layer.forward = partial(_block, layer.forward, index)
    try:
        yield
    finally:
        for _, layer in layers:
            layer.__dict__.pop("forward", None)  # restores the class's own


def _block(forward: Any, index: int, hidden: Tensor, *args: Any, **arguments: Any) -> Any:
    cache = arguments.pop(CACHE_ARGUMENT, None)
    if cache is None:
        return checkpoint(partial(forward, **arguments), hidden, *args, use_reentrant=False)
    run = partial(with_kv, forward, args=args, arguments=arguments, kv_only=completes(cache, index))
    output, keys, values = checkpoint(run, hidden, *kv_of(cache, index), use_reentrant=False)
    cache.update(keys, values, index)
    return output


def kv_of(cache: Any, index: int) -> tuple[Tensor | None, Tensor | None]:
    """Return K and V of a layer of transformers' cache, (None, None) if there are none."""
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return (None, None) if layer is None else (layer.keys, layer.values)


def with_kv(
    block: Any,
    hidden: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    args: Any = (),
    arguments: Any = None,
    kv_only: bool = False,
) -> tuple[Any, Tensor, Tensor]:
    """Run a block after cached keys and values, or only until its own are known.

    Returns its output (with kv_only, the hidden states that went in), new keys and new values.
    """
    cache, output = _BlockCache(keys, values, kv_only), hidden.detach()
    with suppress(Complete):
        output = block(hidden, *args, **{CACHE_ARGUMENT: cache}, **(arguments or {}))
    return output, *cache.new


class _BlockCache:
    """The cache of one block: it hands the attention old and new K and V together, and remembers the new."""

    def __init__(self, keys: Tensor | None, values: Tensor | None, kv_only: bool):
        self.kv_only = kv_only
        self.before = None if keys is None or values is None else (keys, values)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new = keys, values
        if self.kv_only:
            raise Complete
        if self.before is None:
            return self.new
        return torch.cat([self.before[0], keys], -2), torch.cat([self.before[1], values], -2)
