"""Logits of many positions a piece at a time: with a vocabulary of 262,144, all at once would take gigabytes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20  # float32 logits of one piece


def position_pieces(count: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices that cover `count` positions, each with at most PIECE_BYTES of logits."""
    size = max(1, PIECE_BYTES // (4 * vocabulary))
    yield from (slice(start, start + size) for start in range(0, count, size))


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return logits (..., vocabulary) of the hidden states (..., hidden) that `model.model` returned."""
    logits = model.lm_head(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)  # of Gemma 2 and 3
    return logits if cap is None else cap * torch.tanh(logits / cap)


def log_probabilities(model: Any, hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return log-probabilities (..., vocabulary) of hidden states."""
    return head_logits(model, hidden).log_softmax(-1, dtype=dtype)
