"""One token for each row of a decode batch; a CUDA graph where the cache is static and lies on a GPU."""

from typing import Any

import torch
from torch import Tensor

from qsun.runtime.decode_cache import CACHE_ARGUMENT, DecodeCache
from qsun.runtime.seam import goes_unmasked, seam_masks, unmasked


class DecodeStep:
    """The decode model over one batch cache.

    Nothing in `_forward` depends on the values of a tensor, so that with a static cache it can be captured once and
    replayed: the column is read from the cache's own tensor, and shapes never change.

    Args:
        model: the decode module's causal LM.
        starts: (B,) int64, first column of each row that is no padding.
    """

    def __init__(self, model: Any, cache: DecodeCache, starts: Tensor):
        self.model, self.cache, self.starts = model, cache, starts
        self._tokens = torch.zeros(cache.rows, 1, dtype=torch.int64, device=starts.device)
        self._padded = bool(starts.any())
        self._graph: Any = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Feed (B,) tokens; (B, vocabulary) logits of those that follow. They hold until the next call."""
        self._tokens.copy_(tokens[:, None])
        if not (self.cache.static and self._tokens.is_cuda):
            logits = self._forward()
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
            logits = self._logits
        self.cache.advance()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; not with a static cache."""
        self.cache.keep(rows)
        self.starts, self._tokens = self.starts[rows], self._tokens[rows]
        self._padded = bool(self.starts.any())

    def _forward(self) -> Tensor:
        cache = self.cache
        return self.model(
            input_ids=self._tokens,
            attention_mask=self._masks(),
            position_ids=cache.column - self.starts[:, None],
            **{CACHE_ARGUMENT: cache},
            use_cache=True,
        ).logits[:, -1]

    def _masks(self) -> Any:
        """None where every row sees every column and that makes attention faster."""
        cache = self.cache
        length = cache.columns if cache.static else cache.filled + 1
        if not self._padded and not cache.static and goes_unmasked(self.model, length):
            return unmasked(self.model)
        return seam_masks(self.model, self.starts, cache.column, length)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()  # allocates what a capture must not; the capture writes the same column again
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward()
