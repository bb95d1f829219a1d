"""The decode module over a running batch: any rows of any models, one token each a step.

On a GPU a step is a CUDA graph, one for each size of batch and of context, both rounded up so that there are few.
"""

from typing import Any

import torch
from torch import Tensor

from qsun.engine.slot_cache import SlotCache
from qsun.runtime.decode_cache import CACHE_ARGUMENT
from qsun.runtime.seam import goes_unmasked, seam_masks, unmasked

_GRAPH_COLUMNS = 256
_MOST_GRAPHS = 64


class DecodeBatch:
    """Rows that decode together.

    Args:
        model: the decode module's causal LM. budget_tokens: of KV, rows x columns.
        static: fixed shapes, as CUDA graphs need; None: on a GPU.
    """

    def __init__(self, model: Any, budget_tokens: int, static: bool | None = None):
        weight = model.model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.cache = SlotCache(model.config, weight, budget_tokens)
        self.static = self.device.type == "cuda" if static is None else static
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._graphs_of = self.cache.allocations
        self._tokens = torch.zeros(0, 1, dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return self.cache.rows

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Feed one token to each row; (rows, vocabulary) logits of those that follow. They hold until the next call."""
        rows = len(tokens)
        self.cache.view = self._view(rows)
        self._feed(tokens)
        logits = self._replay() if self.static and self.device.type == "cuda" else self._forward()
        self.cache.advance()
        return logits[:rows]

    def _view(self, rows: int) -> tuple[int, int]:
        """Rows and columns that the step computes with."""
        columns = max(self.cache.filled) + 1
        if not self.static:
            return rows, columns
        most_rows, most_columns = self.cache.capacity
        return min(_power_of_two(rows), most_rows), min(-(-columns // _GRAPH_COLUMNS) * _GRAPH_COLUMNS, most_columns)

    def _feed(self, tokens: list[int]) -> None:
        capacity = self.cache.capacity[0]
        if len(self._tokens) != capacity:
            self._tokens = torch.zeros(capacity, 1, dtype=torch.int64, device=self.device)
        self._tokens[: len(tokens), 0] = torch.tensor(tokens, dtype=torch.int64)

    def _forward(self) -> Tensor:
        """Nothing here depends on the values of a tensor. Rows beyond those in use write to a row that nobody reads."""
        rows, _ = self.cache.view
        columns = self.cache.lengths[:rows, None]
        return self.model(
            input_ids=self._tokens[:rows],
            attention_mask=self._masks(columns),
            position_ids=columns,
            **{CACHE_ARGUMENT: self.cache},
            use_cache=True,
        ).logits[:, -1]

    def _masks(self, columns: Tensor) -> Any:
        """None where every row sees every column and that makes attention faster."""
        rows, length = self.cache.view
        if not self.static and len(set(self.cache.filled)) == 1 and goes_unmasked(self.model, length):
            return unmasked(self.model)
        starts = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return seam_masks(self.model, starts, columns, length)

    def _replay(self) -> Tensor:
        if self._graphs_of != self.cache.allocations or len(self._graphs) > _MOST_GRAPHS:
            self._graphs, self._graphs_of = {}, self.cache.allocations  # graphs hold the addresses of old buffers
        if self.cache.view not in self._graphs:
            self._graphs[self.cache.view] = self._capture()
        graph, logits = self._graphs[self.cache.view]
        graph.replay()
        return logits

    def _capture(self) -> tuple[Any, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()  # allocates what a capture must not; the capture writes the same columns again
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward()
        return graph, logits


def _power_of_two(rows: int) -> int:
    return 1 << (rows - 1).bit_length()
