"""The loss of response tokens, a piece of positions at a time: logits of a whole batch never exist.

With a vocabulary of 262,144, the float32 logits of 1,000 tokens take a gigabyte, and their gradient another. The
gradient of a piece is taken as soon as its loss is known, so nothing is computed twice. Distillation minimizes the
Kullback-Leibler divergence from a teacher's next-token distributions, at response tokens (arXiv 2609.26333).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qsun.runtime.logits import head_logits, position_pieces
from qsun.runtime.seam import IGNORED

_PieceLoss = Callable[[Tensor, slice], Tensor]


def response_loss(
    model: Any, hidden: Tensor, labels: Tensor, teacher: tuple[Any, Tensor] | None = None, weight: float = 0.0
) -> Tensor:
    """Return (1 - weight) * cross-entropy + weight * KL(teacher || model), summed over response tokens.

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
