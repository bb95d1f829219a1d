"""From logits to the next token. A row's draw depends on its own seed and logits only, not on its batch."""

import torch
from torch import Tensor

_SEED_STRIDE = 0x9E3779B1  # odd, so that the low 32 bits differ: torch's generator on a CPU reads no others


def row_seed(seed: int, number: int) -> int:
    """Return the seed of a call's row by its number, within what manual_seed accepts; row 0 has the call's own."""
    return seed + number * _SEED_STRIDE


def draw(
    logits: Tensor, numbers: Tensor, temperature: float | Tensor, top_p: float | Tensor, top_k: int | Tensor
) -> Tensor:
    """Invert the cumulative distribution of the kept tokens, most likely first.

    Args:
        logits: (B, vocabulary). numbers: (B,) uniform in [0, 1), float64.
        temperature, top_p, top_k: one for all rows, or (B,) each.
    Returns:
        (B,) tokens.
    """
    temperature, top_p, top_k = (
        torch.as_tensor(setting, device=logits.device).reshape(-1, 1) for setting in (temperature, top_p, top_k)
    )
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    # from the largest down, so that the smallest temperature overflows to 0 probability and not to NaN
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = probabilities.masked_fill((rank >= top_k) & (top_k > 0), 0)
    probabilities /= probabilities.sum(-1, keepdim=True)
    mass = probabilities.cumsum(-1)
    probabilities = probabilities.where(mass - probabilities < top_p, 0)  # the token that crosses top_p is kept
    mass = probabilities.cumsum(-1)
    place = (mass <= numbers[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(-1, place.minimum(last)).squeeze(-1)
