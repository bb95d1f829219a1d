"""The forward pass of a prefill module, which ends where its KV cache is complete.

Nothing reads what the last layer computes after its K and V: its attention, o_proj and MLP are left out. The pass ends
by an exception that the last write to the cache raises, which works for every architecture without touching its code.
"""

from contextlib import suppress
from typing import Any

from torch import Tensor

from qsun.runtime.kv_cache import CACHE_ARGUMENT


def fill_cache(model: Any, cache: Any, **inputs: Any) -> None:
    """Add the K and V of all layers to a cache; inputs are those of transformers' forward."""
    with suppress(Complete):
        model.model(**inputs, **{CACHE_ARGUMENT: _UntilComplete(cache, len(model.model.layers) - 1)}, use_cache=True)


class Complete(Exception):
    """Raised by the last write to a cache."""


def completes(cache: Any, layer: int) -> bool:
    """Whether a pass over this cache ends once this layer has written its K and V."""
    return isinstance(cache, _UntilComplete) and cache.last == layer


class _UntilComplete:
    """A cache that raises once the layer `last` has written."""

    def __init__(self, cache: Any, last: int):
        self._cache, self.last = cache, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **arguments: Any) -> Any:
        written = self._cache.update(keys, values, layer, *args, **arguments)
        if layer == self.last:
            raise Complete
        return written
