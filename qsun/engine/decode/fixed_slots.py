"""Slots in memory that never moves, for steps that are captured as CUDA graphs."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qsun.engine.decode.buckets import column_buckets, columns_bucket, rows_bucket, widened
from qsun.engine.decode.slot_cache import SlotCache
from qsun.engine.decode.slot_memory import lend_memory


class FixedSlots(SlotCache):
    """A SlotCache whose whole budget is allocated at once, and whose columns are one of a few sizes.

    Buffers are views of that memory, (budget // columns, heads, columns, head_dim). Rows that need more columns move
    within it, to views with more of them and fewer rows.

    Attributes:
        most_columns: that a row can have: the model's positions, or the budget.
    """

    def __init__(self, model: Any, budget_tokens: int, kv_dtype: str = "auto"):
        positions = getattr(model.config, "max_position_embeddings", budget_tokens)
        self.most_columns = min(budget_tokens, positions)
        rows = budget_tokens // column_buckets(self.most_columns)[0]
        self.memory = lend_memory(model, budget_tokens, rows, kv_dtype, self)
        super().__init__(model.config, model.model.embed_tokens.weight, budget_tokens, kv_dtype=kv_dtype)

    @cached_property
    def column_sizes(self) -> list[int]:
        """The columns that buffers can have, in ascending order."""
        return widened(column_buckets(self.most_columns), self.budget_tokens)

    def fits(self, needs: Sequence[int]) -> bool:
        return (self.rows + len(needs)) * self._bucket(max([*needs, *self.needs])) <= self.budget_tokens

    def reserve(self, needs: Sequence[int]) -> None:
        rows, need = self.rows + len(needs), max([*needs, *self.needs], default=0)
        have_rows, have_columns = self.capacity
        if rows > have_rows or need > have_columns:
            columns = self._bucket(need)
            kept = max(columns, have_columns)
            self.shape(kept if rows * kept <= self.budget_tokens else columns)

    def shape(self, columns: int) -> None:
        """Give the buffers this many columns, one of column_sizes."""
        self._allocate(self.budget_tokens // columns, columns)

    def _bucket(self, columns: int) -> int:
        return next((size for size in self.column_sizes if size >= columns), columns)

    def _allocate(self, rows: int, columns: int) -> None:
        columns = columns or self.column_sizes[0]
        rows, filled = self.budget_tokens // columns, max(self.filled, default=0)
        new = self.memory.buffers(rows, columns)
        for layer in range(len(new)) if self.rows else ():
            for buffer, old in zip(new[layer], self.buffers[layer], strict=True):
                kept = old[: self.rows, :, :filled].clone()  # where it goes, others lie
                buffer[: self.rows, :, :filled] = kept
        self.buffers, self._capacity = new, (rows, columns)
        self.lengths, self.tokens = self.memory.lengths, self.memory.fed
        self._starts = self.memory.starts(columns)


def has_fixed_shapes(model: Any, static: bool | None) -> bool:
    """Return whether steps of this model compute with fixed shapes; static: None for those on a GPU."""
    return model.model.embed_tokens.weight.device.type == "cuda" if static is None else static


def budget_for(model: Any, rows: int, columns: int, static: bool | None = None) -> int:
    """Return the rows x columns that a decode batch of this many rows needs, of up to so many columns each."""
    if not has_fixed_shapes(model, static):
        return rows * columns
    positions = getattr(model.config, "max_position_embeddings", columns)
    return rows_bucket(rows) * max(columns, columns_bucket(columns, positions))
