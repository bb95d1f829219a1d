"""A decode step: one token, or a few drafted ones, for each row of a slot cache, whichever prefill modules wrote them.

On a GPU a step is a CUDA graph, one for each size of batch and of context, both rounded up so that there are few.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from qsun.engine.slot_cache import SlotCache
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.seam import goes_unmasked, seam_masks, unmasked

_GRAPH_COLUMNS = 256
_MOST_GRAPHS = 64


class DecodeStep:
    """The decode model over the rows of a cache.

    Args:
        model: the decode module's causal LM.
        static: compute with fixed shapes, as CUDA graphs need; None: on a GPU.
    """

    def __init__(self, model: Any, cache: SlotCache, static: bool | None = None):
        self.model, self.cache = model, cache
        self.device: torch.device = model.model.embed_tokens.weight.device
        self.static = self.device.type == "cuda" if static is None else static
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._graphs_of = -1  # allocation whose addresses the graphs hold
        self._pool: Any = None  # of the memory that they share

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
            fed = torch.tensor(padded, dtype=torch.int64, device=self.device)
            columns = None
            if self.static:
                cache.tokens[: len(tokens)] = fed
                fed = cache.tokens[: view[0]]
            elif width > 1:  # what pads a row stays at its last column, within the model's positions
                last = torch.tensor([[len(row) - 1] for row in tokens], device=self.device)
                columns = cache.lengths[: view[0], None] + torch.arange(width, device=self.device).minimum(last)
            logits = self._replay(fed, view) if self.static and fed.is_cuda else self._forward(fed, view, columns)
            cache.advance()
        return logits[: len(tokens)]

    def _view(self, width: int) -> tuple[int, int]:
        """Rows and columns that the step computes with."""
        rows, columns = self.cache.rows, max(self.cache.filled) + width
        if not self.static:
            return rows, columns
        most_rows, most_columns = self.cache.capacity
        return min(_power_of_two(rows), most_rows), min(-(-columns // _GRAPH_COLUMNS) * _GRAPH_COLUMNS, most_columns)

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
        alone = columns.shape[1] == 1 and len(set(self.cache.filled)) == 1
        if not self.static and alone and goes_unmasked(self.model, length):
            return unmasked(self.model)
        return seam_masks(self.model, None, columns, length)

    def _replay(self, tokens: Tensor, view: tuple[int, int]) -> Tensor:
        if self._graphs_of != self.cache.allocations or len(self._graphs) > _MOST_GRAPHS:
            self._graphs, self._graphs_of = {}, self.cache.allocations
            self._pool = torch.cuda.graph_pool_handle()
        if view not in self._graphs:
            self._graphs[view] = self._capture(tokens, view)
        graph, logits = self._graphs[view]
        graph.replay()
        return logits

    def _capture(self, tokens: Tensor, view: tuple[int, int]) -> tuple[Any, Tensor]:
        """Capture on a stream of this device: without one, torch takes a stream of the device it captured on first."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._forward(tokens, view)  # allocates what a capture must not; the capture writes the same columns again
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what another thread does meanwhile, such as loading a module, is none of this capture's concern
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            logits = self._forward(tokens, view)
        return graph, logits


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: a new thread's is 0, and kernels, graphs and streams go by the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power_of_two(rows: int) -> int:
    return 1 << (rows - 1).bit_length()
