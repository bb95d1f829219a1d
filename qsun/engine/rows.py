"""The rows that decode together, and how each of them chooses its next token."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qsun.engine.decode_batch import DecodeBatch
from qsun.engine.prefilling import LoadedModule
from qsun.engine.prefix_cache import LayerKV
from qsun.engine.requests import Request, TokenLogprob
from qsun.runtime.row_text import RowText
from qsun.runtime.sampling import draw


@dataclass(eq=False)
class Row:
    """A request that is decoding.

    Attributes:
        token: to be fed next. count: tokens chosen so far. text: None where the model has no tokenizer.
        cached: prompt tokens that came from the prefix cache. random: of this request alone; None where it is greedy.
    """

    request: Request
    owner: LoadedModule
    text: RowText | None
    cached: int
    token: int = 0
    count: int = 0
    random: torch.Generator | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.token = self.request.tokens[-1]
        if self.request.sampling.temperature > 0:
            self.random = torch.Generator().manual_seed(self.request.sampling.seed)


class Running:
    """A decode batch and its rows, kept in the same order.

    Args:
        model: the decode module's causal LM. budget_tokens: of KV.
    """

    def __init__(self, model: Any, budget_tokens: int, static: bool | None):
        self.batch = DecodeBatch(model, budget_tokens, static)
        self.rows: list[Row] = []

    def add(self, row: Row, layers: LayerKV) -> None:
        self.batch.cache.place(layers, row.request.prefix_tokens, row.request.kv_tokens)
        self.rows.append(row)

    def remove(self, row: Row, broken: bool = False) -> None:
        """broken: it computed NaN or Inf, which must not stay in its place."""
        place = self.rows.index(row)
        self.batch.cache.release(place, wipe=broken)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last

    def step(self) -> list[tuple[Row, int | None, TokenLogprob | None]]:
        """One token for each row; None where the model computed no number."""
        logits = self.batch.step([row.token for row in self.rows])
        tokens = choose(logits, self.rows)
        sound = logits.gather(1, tokens[:, None]).isfinite().squeeze(1).tolist()
        logprobs = _logprobs(logits, tokens, self.rows)
        chosen = []
        for place, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            row.token, row.count = token, row.count + 1
            chosen.append((row, token if sound[place] else None, logprobs.get(place)))
        return chosen


def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """(B, vocabulary) logits -> (B,) tokens, each by its own request's settings and random numbers."""
    tokens = logits.argmax(-1)
    places = [place for place, row in enumerate(rows) if row.random is not None]
    if places:
        settings = [rows[place].request.sampling for place in places]
        numbers = torch.cat([torch.rand(1, generator=rows[p].random, dtype=torch.float64) for p in places])
        drawn = draw(
            logits[places],
            numbers.to(logits.device),
            torch.tensor([s.temperature for s in settings], dtype=torch.float64),
            torch.tensor([s.top_p for s in settings], dtype=torch.float64),
            torch.tensor([s.top_k for s in settings]),
        )
        tokens[places] = drawn
    return tokens


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[Row]) -> dict[int, TokenLogprob]:
    places = [place for place, row in enumerate(rows) if row.request.sampling.logprobs is not None]
    if not places:
        return {}
    wanted = [rows[place].request.sampling.logprobs or 0 for place in places]
    known = logits[places].float().log_softmax(-1)
    own = known.gather(1, tokens[places][:, None]).squeeze(1).tolist()
    best = known.topk(min(max(wanted), known.shape[1]), -1)
    found = {}
    for i, (place, count) in enumerate(zip(places, wanted, strict=True)):
        top = zip(best.indices[i, :count].tolist(), best.values[i, :count].tolist(), strict=True)
        found[place] = TokenLogprob(int(tokens[place]), own[i], tuple(top))
    return found
