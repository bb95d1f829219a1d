"""Logits of many positions and what is computed from them, a piece at a time: logits of a whole batch never exist.

With a vocabulary of 262,144, the float32 logits of 1,000 tokens take a gigabyte, and their gradient another. The
gradient of a piece is taken as soon as its loss is known, so nothing is computed twice.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.seam import IGNORED, as_attention_takes_it, mask_kinds, window_of

PIECE_BYTES = 64 << 20  # float32 logits of one piece
_PieceLoss = Callable[[Tensor, slice], Tensor]


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


def response_loss(
    model: Any, hidden: Tensor, labels: Tensor, teacher: tuple[Any, Tensor] | None = None, weight: float = 0.0
) -> Tensor:
    """Return (1 - weight) * cross-entropy + weight * KL(teacher || model), summed over response tokens.

    Distillation minimizes the divergence from a teacher's next-token distributions (arXiv 2609.26333).

    Args:
        model: causal LM, whose head turns its hidden states into logits; gradients flow to them and to its head.
        hidden: (B, R, hidden size), what `model.model` returned.
        labels: (B, R) int64, IGNORED where there is no response token.
        teacher: a causal LM of the same vocabulary and its hidden states (B, R, any size); None: cross-entropy only.
    Returns:
        A scalar, in float32 at least.
    """
    rows = labels != IGNORED
    targets, states = labels[rows], None if teacher is None else teacher[1][rows]
    precise = torch.promote_types(hidden.dtype, torch.float32)

    def piece_loss(part: Tensor, piece: slice) -> Tensor:
        found = head_logits(model, part).log_softmax(-1, dtype=precise)
        likelihood = F.nll_loss(found, targets[piece], reduction="sum")
        if teacher is None or states is None:
            return likelihood
        with torch.no_grad():
            wanted = head_logits(teacher[0], states[piece]).log_softmax(-1, dtype=precise)
        return (1 - weight) * likelihood + weight * F.kl_div(found, wanted, reduction="sum", log_target=True)

    head = [parameter for parameter in model.lm_head.parameters() if parameter.requires_grad]
    summed: Any = _Summed.apply
    total: Tensor = summed(piece_loss, model.config.vocab_size, torch.is_grad_enabled(), hidden[rows], *head)
    return total


class _Summed(torch.autograd.Function):
    """The sum of a loss over pieces of positions, with its gradient taken piece by piece in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, piece_loss: _PieceLoss, vocabulary: int, training: bool, hidden: Tensor, *head: Tensor
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        of_head = [torch.zeros_like(weight, dtype=precise) for weight in head]
        of_hidden = torch.zeros_like(hidden) if training and any(ctx.needs_input_grad) else None
        for piece in position_pieces(len(hidden), vocabulary):
            part = hidden[piece].detach()
            if of_hidden is None:
                total += piece_loss(part, piece)
                continue
            with torch.enable_grad():
                loss = piece_loss(part.requires_grad_(), piece)
            of_hidden[piece], *found = torch.autograd.grad(loss, [part, *head])
            for summed, gradient in zip(of_head, found, strict=True):
                summed.add_(gradient)
            total += loss.detach()
        if of_hidden is not None:
            rounded = (summed.to(weight.dtype) for summed, weight in zip(of_head, head, strict=True))
            ctx.save_for_backward(of_hidden, *rounded)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(upstream[0].to(found.dtype) * found for found in ctx.saved_tensors))
