"""Rotary embeddings whose frequencies depend on the length of a row, each row by its own.

transformers looks at the longest position of a batch instead, so that one long row changes the answers of short ones.
"longrope" (Phi 3, 3.5 and 4) has two sets of frequencies, for rows up to a number of tokens and for longer ones. Keys
of one set do not fit queries of the other, so a row keeps the set of its whole prompt, and the engine refuses requests
that would cross the boundary. "dynamic" changes only beyond max_position_embeddings, which no request may exceed.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_boundary(config: Any) -> int | None:
    """Return the most tokens of a row with the first set of frequencies; None where there is one set only."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings


class RowRotary(nn.Module):
    """Takes the place of a model's rotary embedding.

    Attributes:
        lengths: (B,) tokens that decide each row's set; None: those up to the row's last position.
    """

    def __init__(self, rotary: Any, boundary: int | None):
        super().__init__()
        self.boundary = boundary
        self.lengths: Tensor | None = None
        self.short: Any = _without_updates(rotary)
        self.long: Any = None
        if boundary is not None:
            self.long = _without_updates(rotary)
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, None, seq_len=boundary + 1)
            self.long.inv_freq = frequencies.to(rotary.inv_freq.device)

    def forward(self, x: Tensor, position_ids: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        short = self.short(x, position_ids, *arguments)
        if self.boundary is None:
            return short
        lengths = position_ids.amax(-1) + 1 if self.lengths is None else self.lengths
        far = (lengths > self.boundary)[:, None, None]
        long = self.long(x, position_ids, *arguments)
        return tuple(torch.where(far, *pair) for pair in zip(long, short, strict=True))


def _without_updates(rotary: Any) -> Any:
    """Return a copy whose frequencies stay what they are."""
    fixed = copy.deepcopy(rotary)
    fixed.inv_freq = fixed.original_inv_freq.clone()
    fixed.rope_type = "default"
    return fixed


def use_row_rotary(model: Any) -> None:
    """Let each row of a batch have the frequencies of its own length, where lengths matter; in place, once."""
    rotary = model.model.rotary_emb
    if getattr(rotary, "rope_type", None) in ("longrope", "dynamic"):
        model.model.rotary_emb = RowRotary(rotary, rope_boundary(model.config))


@contextmanager
def row_lengths(model: Any, lengths: Tensor | list[int]) -> Iterator[None]:
    """Within, these (B,) tokens decide each row's frequencies, whatever positions a pass computes."""
    rotary = model.model.rotary_emb
    if not isinstance(rotary, RowRotary):
        yield
        return
    rotary.lengths = torch.as_tensor(lengths, device=rotary.short.inv_freq.device)
    try:
        yield
    finally:
        rotary.lengths = None
