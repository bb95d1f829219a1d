"""A decode step: one token, or a few drafted ones, for each row of a slot cache, whichever prefill modules wrote them.

Over FixedSlots, a step has one of a few shapes; on a GPU there is a CUDA graph for each.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qsun.engine.decode.buckets import row_buckets, rows_bucket, seen_columns
from qsun.engine.decode.fixed_slots import FixedSlots
from qsun.engine.decode.graph_pool import capture
from qsun.engine.decode.slot_cache import SlotCache
from qsun.runtime.fused_block import all_fused
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.seam import goes_unmasked, seam_masks, unmasked, unread_masks


class DecodeStep:
    """The decode model over the rows of a cache, in fixed shapes where the cache is FixedSlots.

    Args:
        model: the decode module's causal LM.
    """

    def __init__(self, model: Any, cache: SlotCache):
        self.model, self.cache = model, cache
        self.device: torch.device = model.model.embed_tokens.weight.device
        self.static = isinstance(cache, FixedSlots)
        self._own_only = all_fused(model)
        self._warmed = False

    @torch.no_grad()
    def warm(self, rows: int) -> int:
        """Capture the graphs of up to `rows` rows before there are any; the largest come first, as they share memory.

        Returns:
            How many there are now: 0 where steps are not graphs.
        """
        cache = self.cache
        if not isinstance(cache, FixedSlots) or self.device.type != "cuda":
            return 0
        self._warmed = True
        with on_device(self.device):
            for columns in reversed(cache.column_sizes):
                cache.shape(columns)
                for count in reversed(row_buckets(min(rows_bucket(rows), cache.capacity[0]))):
                    for seen in reversed(self._seen(columns)):
                        self._graph(cache, (count, seen))
            cache.shape(cache.column_sizes[0])
        return len(cache.memory.graphs)

    @torch.no_grad()
    def __call__(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feed tokens to each row: its last one, then those drafted. The cache counts the last one only.

        Returns:
            (rows, T, vocabulary) logits of the tokens that follow, T the most that a row feeds; of a row that feeds
            fewer, only as many count. They hold until the next call.
        """
        cache, width = self.cache, max(map(len, tokens))
        view = self._view(width)
        with on_device(self.device):
            padded = [[*row, *[0] * (width - len(row))] for row in tokens]
            columns = None
            if self.static:
                cache.tokens[: len(tokens)].copy_(torch.tensor(padded))
                fed = cache.tokens[: view[0]]
            else:
                fed = torch.tensor(padded, device=self.device)
            if not self.static and width > 1:  # what pads a row stays at its last column, within the model's positions
                last = torch.tensor([[len(row) - 1] for row in tokens], device=self.device)
                columns = cache.lengths[: view[0], None] + torch.arange(width, device=self.device).minimum(last)
            if isinstance(cache, FixedSlots) and fed.is_cuda:
                graph, logits = self._graph(cache, view)
                graph.replay()
            else:
                logits = self._forward(fed, view, columns)
            cache.advance()
        return logits[: len(tokens)]

    def _view(self, width: int) -> tuple[int, int]:
        """Rows and columns that the step computes with."""
        rows, columns = self.cache.rows, max(self.cache.filled) + width
        if not self.static:
            return rows, columns
        most_rows, most_columns = self.cache.capacity
        seen = next(size for size in self._seen(most_columns) if size >= columns)
        return min(rows_bucket(rows), most_rows), seen

    def _seen(self, columns: int) -> list[int]:
        return seen_columns(columns, self._own_only, coarse=self._warmed)

    def _forward(self, tokens: Tensor, view: tuple[int, int], columns: Tensor | None = None) -> Tensor:
        """Nothing here depends on the values of a tensor. Rows beyond those in use write to rows that are not read.

        columns: of the tokens, where they are not the first free ones.
        """
        self.cache.start(view, tokens.shape[1])
        if columns is None:
            columns = self.cache.lengths[: view[0], None]
        return self.model(
            input_ids=tokens,
            attention_mask=self._masks(columns),
            position_ids=columns,
            **{CACHE_ARGUMENT: self.cache},
            use_cache=True,
        ).logits

    def _masks(self, columns: Tensor) -> Any:
        """None where every row sees every column and that makes attention faster."""
        length = self.cache.view[1]
        if self._own_only and columns.shape[1] == 1:
            return unread_masks(self.model)
        alone = columns.shape[1] == 1 and len(set(self.cache.filled)) == 1
        if not self.static and alone and goes_unmasked(self.model, length):
            return unmasked(self.model)
        return seam_masks(self.model, None, columns, length)

    def _graph(self, cache: FixedSlots, view: tuple[int, int]) -> tuple[Any, Tensor]:
        """Return the graph of a step and its logits; captured when it is first needed, if it has not been warmed."""
        key, graphs = (view[0], cache.capacity[1], view[1]), cache.memory.graphs
        if key not in graphs:

            def step() -> Tensor:  # twice: the second time it writes the same columns again
                logits = self._forward(cache.tokens[: view[0]], view)
                return cache.memory.logits(logits).copy_(logits)

            graph = capture(self.device, step)
            graphs[key] = graph, cache.memory.logits_of(view[0])
        return graphs[key]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: a new thread's is 0, and kernels, graphs and streams go by the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
