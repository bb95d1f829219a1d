"""How far a quantized model's next-token distribution is from the full-precision one's."""

import math

import torch
from torch import Tensor, nn

_WINDOWS_AT_ONCE = 16


@torch.no_grad()
def log_probabilities(model: nn.Module, windows: Tensor) -> Tensor:
    """(B, T, vocabulary) float32 log-probabilities for token windows (B, T)."""
    parts = [model(input_ids=part).logits.float().log_softmax(-1) for part in windows.split(_WINDOWS_AT_ONCE)]
    return torch.cat(parts)


@torch.no_grad()
def mean_divergence(model: nn.Module, reference: Tensor, windows: Tensor) -> float:
    """Mean KL(reference || model) over all positions, in nats; reference: log-probabilities of the same windows."""
    total = 0.0
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        ours = log_probabilities(model, windows[start : start + _WINDOWS_AT_ONCE])
        theirs = reference[start : start + _WINDOWS_AT_ONCE]
        total += float((theirs.exp() * (theirs - ours)).sum())
    return total / windows.numel()


def perplexity(log_probs: Tensor, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first."""
    taken = log_probs[:, :-1].gather(-1, windows[:, 1:, None])
    return math.exp(-float(taken.double().mean()))
