"""KV of the beginnings of prompts, kept for the next prompt that begins alike, under the same prefill module only.

The KV of a prompt belongs to (prefill module, tokens): a cache keyed by tokens alone hands one task's answer to another
(seen in vLLM). The key of a block of tokens is a SHA-256 over the module's own number, which no other load of any
module ever has, and all tokens up to the block's end.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_TOKENS = 32

LayerKV = list[tuple[Tensor, Tensor]]


class PrefixCache:
    """Blocks of KV within a budget; the least recently used goes first.

    `variant` tells prompts apart whose tokens are equal and whose KV is not.

    Attributes:
        bytes: held. hits, lookups: prompt tokens found, and prompt tokens asked for.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.bytes = self.hits = self.lookups = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()  # (2 layers, heads, tokens, head_dim), K before V
        self._modules: dict[bytes, int] = {}

    def find(self, module: int, tokens: Sequence[int], variant: int = 0) -> tuple[int, LayerKV]:
        """Return the longest known beginning: its tokens, and (heads, tokens, head_dim) keys and values by layer."""
        self.lookups += len(tokens)
        keys = []
        for key in _keys(module, tokens, variant) if self._blocks else ():
            if key not in self._blocks:
                break
            keys.append(key)
        self._touch(keys)
        if not keys:
            return 0, []
        self.hits += len(keys) * BLOCK_TOKENS
        parts = torch.cat([self._blocks[key] for key in keys], 2).unbind()
        return len(keys) * BLOCK_TOKENS, list(zip(parts[::2], parts[1::2], strict=True))

    def keep(self, module: int, tokens: Sequence[int], layers: LayerKV, variant: int = 0) -> None:
        """Keep the whole blocks of a prompt that fit the budget, a copy of each for all layers at once.

        Args:
            layers: (heads, tokens, head_dim), equal in all, with at least as many tokens.
        """
        if not self.budget_bytes or len(tokens) < BLOCK_TOKENS:
            return
        cut = [part.split(BLOCK_TOKENS, 1) for layer in layers for part in layer]  # views
        block_bytes = sum(views[0].nbytes for views in cut)
        keys = _keys(module, tokens, variant)[: self.budget_bytes // block_bytes]
        self._touch(keys)
        for number, key in enumerate(keys):
            if key in self._blocks:
                continue
            while self.bytes + block_bytes > self.budget_bytes:  # before the copy is made
                self._drop(next(iter(self._blocks)))
            self._blocks[key] = torch.stack([views[number] for views in cut])
            self._modules[key] = module
            self.bytes += block_bytes
        self._touch(keys)

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Note that blocks were used. A beginning is newer than what follows it, and so goes last."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def forget(self, module: int) -> None:
        """Drop all blocks of a module."""
        for key in [key for key, owner in self._modules.items() if owner == module]:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        self.bytes -= self._blocks.pop(key).nbytes
        del self._modules[key]


def _keys(module: int, tokens: Sequence[int], variant: int) -> list[bytes]:
    """Return a key for each whole block, over everything before its end."""
    chain = hashlib.sha256(array("q", [module, variant]).tobytes())
    keys = []
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        chain.update(array("q", tokens[start : start + BLOCK_TOKENS]).tobytes())
        keys.append(chain.digest())
    return keys
