"""The KV cache of a decode batch: rows come and go, and each has a length of its own.

Rows in use are always the first ones, so that attention reads one slice of the buffers and nothing is gathered: the
last row takes the place of one that leaves. Buffers grow to the rectangle (rows x columns) that the running requests
need and never beyond the budget: many short requests or a few long ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsun.model.architectures import kv_shape
from qsun.runtime.kv_cache import decode_kv, encode_kv, kv_tensors

_COLUMNS = 64  # buffers' columns are a multiple of this


class SlotCache:
    """Keys and values of the rows of a decode batch, (rows, heads, columns, head_dim) by layer.

    Args:
        config: of the decode model. like: a tensor of its dtype and device. budget_tokens: most rows x columns.
        spare: columns beyond those that a row needs, for drafted tokens that turn out wrong.
        kv_dtype: of KV_DTYPES. In fp8, every head of every token has a scale.

    Attributes:
        dtype: of the model. buffers: keys and values of each layer; in fp8 (uint8), their scales follow,
            (rows, heads, columns, 1).
        rows: in use. lengths: (capacity,) int64, columns filled in each row, on the device.
        tokens: (capacity, 1) int64, to be fed by the step, on the device.
        view: (rows, columns) that attention is given in this step.
    """

    def __init__(self, config: Any, like: Tensor, budget_tokens: int, spare: int = 0, kv_dtype: str = "auto"):
        self._layers, self._heads, self._width = kv_shape(config)
        self._like, self.budget_tokens, self._spare = like, budget_tokens, spare
        self.dtype, self.fp8 = like.dtype, kv_dtype == "fp8"
        self._tensors = kv_tensors(self._width, like.dtype, kv_dtype)
        self.rows = 0
        self.view, self._width_of_step = (0, 0), 1
        self._places: Tensor | None = (
            None  # of this step's tokens in flat buffers; the first layer to ask computes them
        )
        self.needs: list[int] = []
        self.filled: list[int] = []
        self.buffers: list[tuple[Tensor, ...]] = []
        self._allocate(0, 0)

    @property
    def capacity(self) -> tuple[int, int]:
        """(rows, columns) of the buffers."""
        return self._capacity

    def fits(self, needs: Sequence[int]) -> bool:
        """Return whether more rows, with this many columns each, stay within the budget."""
        return (self.rows + len(needs)) * (max([*needs, *self.needs]) + self._spare) <= self.budget_tokens

    def reserve(self, needs: Sequence[int]) -> None:
        """Make room at once for more rows, with this many columns each. The caller has asked `fits`."""
        rows, columns = self.rows + len(needs), max([*needs, *self.needs], default=0) + self._spare
        have_rows, have_columns = self.capacity
        if rows <= have_rows and columns <= have_columns:
            return
        columns = max(columns, min(-(-columns // _COLUMNS) * _COLUMNS, self.budget_tokens // rows))
        if rows * have_columns <= self.budget_tokens:
            columns = max(columns, have_columns)
        most = self.budget_tokens // columns
        self._allocate(max(rows, min(most, max(have_rows, 2 * rows))), columns)

    def place(self, layers: Sequence[tuple[Tensor, Tensor]], filled: int, need: int) -> int:
        """Add a row: its prefilled keys and values, (heads, filled, head_dim) by layer (none for filled 0).

        Returns its number. The caller has asked `fits`.
        """
        row = self.rows
        self.reserve([need])
        for buffers, new in zip(self.buffers, layers, strict=False):
            for buffer, tensor in zip(buffers, self._stored(*new), strict=True):
                buffer[row, :, :filled] = tensor
        self.rows += 1
        self.needs.append(need)
        self.filled.append(filled)
        self.lengths[row] = filled
        return row

    def release(self, row: int, wipe: bool = False) -> None:
        """Remove a row; the last one takes its number.

        Args:
            wipe: it holds NaN or Inf. A mask does not hide those from the next row in this place: 0 x NaN is NaN.
        """
        last = self.rows - 1
        if wipe:
            self.wipe(row)
        if row != last:
            filled = self.filled[last]
            for buffers in self.buffers:
                for buffer in buffers:
                    buffer[row, :, :filled] = buffer[last, :, :filled]
            self.needs[row], self.filled[row] = self.needs[last], filled
            self.lengths[row] = filled
        self.lengths[last] = 0
        self.rows = last
        self.needs.pop()
        self.filled.pop()

    def wipe(self, row: int, first: int = 0) -> None:
        """Zero a row's keys and values from a column on."""
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[row, :, first:].zero_()

    def start(self, view: tuple[int, int], width: int = 1) -> None:
        """Begin a step of `width` tokens a row, or the capture of one."""
        self.view, self._width_of_step, self._places = view, width, None

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Count one more of the tokens that every layer has written for these rows; None: for all in use."""
        if rows is None:
            self.filled = [length + 1 for length in self.filled]
            self.lengths[: self.rows] += 1
            return
        for row in rows:
            self.filled[row] += 1
        self.lengths[rows] += 1

    def _allocate(self, rows: int, columns: int) -> None:
        self._capacity = (rows, columns)
        kept = min(columns, max(self.filled, default=0))
        for index in range(self._layers):
            new = tuple(
                self._like.new_zeros((rows, self._heads, columns, width), dtype=dtype) for width, dtype in self._tensors
            )
            if index == len(self.buffers):
                self.buffers.append(new)
                continue
            for buffer, old in zip(new, self.buffers[index], strict=True):
                buffer[: self.rows, :, :kept] = old[: self.rows, :, :kept]
            self.buffers[index] = new  # one layer's old buffers at a time lie beside the new ones
        lengths = torch.zeros(rows, dtype=torch.int64, device=self._like.device)
        lengths[: self.rows] = torch.tensor(self.filled, dtype=torch.int64)
        self.lengths = lengths
        self.tokens = lengths.new_zeros(rows, 1)
        numbers = torch.arange(rows * self._heads, device=self._like.device)
        self._starts = numbers.view(rows, self._heads) * columns  # of each head's columns in a flat buffer

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write T tokens a row, (rows, heads, T, head_dim), and return what to attend to; attention layers call it."""
        rows, columns = self.view
        if self._places is None:
            first = self._starts[:rows] + self.lengths[:rows, None]
            self._places = (first[..., None] + torch.arange(keys.shape[2], device=first.device)).flatten()
        buffers = self.buffers[layer]
        for buffer, new in zip(buffers, self._stored(keys, values), strict=True):
            width = buffer.shape[-1]
            buffer.view(-1, width).index_copy_(0, self._places, new.reshape(-1, width))
        seen = [buffer[:rows, :, :columns] for buffer in buffers]
        if not self.fp8:
            return seen[0], seen[1]
        return decode_kv(seen[0], seen[2], self.dtype), decode_kv(seen[1], seen[3], self.dtype)

    def _stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return what the buffers hold of keys and values."""
        if not self.fp8:
            return keys, values
        (k, k_scales), (v, v_scales) = encode_kv(keys), encode_kv(values)
        return k, v, k_scales, v_scales

    def get_seq_length(self, *_: Any) -> int:
        """Return the columns before this step's; transformers calls it."""
        return self.view[1] - self._width_of_step

    get_query_offset = get_seq_length

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return the columns that a step sees and the first of them; transformers calls it where it has no mask."""
        return self.view[1], 0
