"""The rows that decode together: each feeds its last token and is given its next."""

from collections.abc import Set
from typing import Any

from qsun.engine.decode_step import DecodeStep
from qsun.engine.prefix_cache import LayerKV
from qsun.engine.row import Row
from qsun.engine.slot_cache import SlotCache
from qsun.engine.token_choice import ChosenToken, choose


class DecodeBatch:
    """Rows, in the order of the cache that holds their keys and values.

    Args:
        model: the decode module's causal LM. budget_tokens: of KV, rows x columns.
        static: see DecodeStep.
    """

    def __init__(self, model: Any, budget_tokens: int, static: bool | None = None):
        self.cache = SlotCache(model.config, model.model.embed_tokens.weight, budget_tokens)
        self.rows: list[Row] = []
        self._step = DecodeStep(model, self.cache, static)

    def add(self, row: Row, layers: LayerKV) -> None:
        self.cache.place(layers, row.request.prefix_tokens, row.request.kv_tokens)
        self.rows.append(row)

    def remove(self, row: Row, broken: bool = False) -> None:
        """Remove a row; broken: it computed NaN or Inf, which must not stay in its place."""
        place = self.rows.index(row)
        self.cache.release(place, wipe=broken)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last

    def step(self, eos: Set[int] = frozenset()) -> list[tuple[Row, ChosenToken]]:
        """Choose one token for each row. eos: the model's end tokens."""
        choices = choose(self._step([row.token for row in self.rows]), self.rows, eos)
        return list(zip(self.rows, choices, strict=True))
