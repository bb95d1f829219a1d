"""Logits of many positions, a piece at a time: with a vocabulary of 262,144, all at once would take gigabytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.seam import as_attention_takes_it, mask_kinds, window_of

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


@torch.no_grad()
def prompt_hidden(
    model: Any, tokens: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]], first: int, last: int
) -> Tensor:
    """Return hidden states (last - first, hidden) that score a prompt's own tokens over the seam.

    Token t(i) is scored by the decode module, fed with t(i-1) on the prefill module's KV of t(0) .. t(i-2). All tokens
    are fed at once: each sees the prefill module's columns before its position, and besides only itself.

    Args:
        model: the decode module's causal LM. tokens: of the prompt.
        layers: the prefill module's keys and values, (heads, at least last - 1 tokens, head_dim) each.
    """
    weight = model.model.embed_tokens.weight
    prefix, positions = last - 1, torch.arange(first, last, device=weight.device)
    cache = DynamicCache()
    for index, kv in enumerate(layers if prefix else ()):
        keys, values = (tensor[None, :, :prefix].to(weight.device, weight.dtype) for tensor in kv)
        cache.update(keys, values, index)
    column = torch.arange(prefix + last - first, device=weight.device)
    query = positions[:, None]
    own = column == query - first + prefix
    masks = {}
    for kind in mask_kinds(model.config):
        window = window_of(model.config, kind)
        before = (column < query) & (column < prefix)
        seen = before if window is None else before & (column > query - window)
        masks[kind] = as_attention_takes_it((seen | own)[None, None], model)
    return model.model(
        input_ids=torch.tensor([list(tokens[first:last])], device=weight.device),
        attention_mask=masks.get("all", masks),
        position_ids=positions[None],
        **{CACHE_ARGUMENT: cache},
        use_cache=True,
    ).last_hidden_state[0]
