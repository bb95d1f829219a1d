"""From logits to the next token, by a row's own settings, tokens and random numbers only, never by its batch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_SEED_STRIDE = 0x9E3779B1  # odd, so that the low 32 bits differ: torch's generator on a CPU reads no others
_HEAD = 512  # most likely tokens, among which nearly every draw ends


def row_seed(seed: int, number: int) -> int:
    """Return the seed of a call's row by its number, within what manual_seed accepts; row 0 has the call's own."""
    return seed + number * _SEED_STRIDE


def draw(
    logits: Tensor,
    numbers: Tensor,
    temperature: float | Tensor,
    top_p: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """Invert the cumulative distribution of the kept tokens, most likely first, of equal ones the lowest first.

    Args:
        logits: (B, vocabulary). numbers: (B,) uniform in [0, 1), float64.
        temperature, top_k, top_p, min_p: as in transformers and in this order; one for all rows, or (B,) each. min_p
            keeps tokens with at least this share of the most likely one's probability.
    Returns:
        (B,) tokens.
    """
    settings = torch.stack(
        [
            torch.as_tensor(setting, dtype=torch.float64, device=logits.device).expand(len(logits))
            for setting in (numbers, temperature, top_p, top_k, min_p)
        ],
        1,
    )
    if logits.shape[1] <= 2 * _HEAD:
        return _draw_of_all(logits, settings)
    rows = 1 if logits.device.type == "cpu" else len(logits)  # one row's numbers stay in a CPU's cache
    parts = zip(logits.split(rows), settings.split(rows), strict=True)
    tokens, found = (torch.cat(found) for found in zip(*(_draw_of_head(*part) for part in parts), strict=True))
    left = (~found).nonzero().flatten()
    if len(left):
        tokens[left] = _draw_of_all(logits[left], settings[left])
    return tokens


def _draw_of_all(logits: Tensor, settings: Tensor) -> Tensor:
    numbers, temperature, top_p, top_k, min_p = settings[..., None].unbind(1)
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    # from the largest down, so that the smallest temperature overflows to 0 probability and not to NaN
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = probabilities.masked_fill((rank >= top_k) & (top_k > 0), 0)
    probabilities /= probabilities.sum(-1, keepdim=True)
    mass = probabilities.cumsum(-1)
    probabilities = probabilities.where(mass - probabilities < top_p, 0)  # the token that crosses top_p is kept
    probabilities = probabilities.where(probabilities >= min_p * probabilities[:, :1], 0)
    mass = probabilities.cumsum(-1)
    place = (mass <= numbers * mass[:, -1:]).sum(-1, keepdim=True)
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(-1, place.minimum(last)).squeeze(-1)


def _draw_of_head(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and which of them are right, both (B,): those whose draw needs only the most likely tokens.

    Sorting a whole vocabulary takes as long as a small model's decode step.
    """
    numbers, temperature, top_p, top_k, min_p = settings[..., None].unbind(1)
    values, tokens, known = _head(logits)
    largest, count = values[:, :1].double(), known.sum(-1, keepdim=True)
    weights = ((values.double() - largest) / temperature).exp() * known  # the first is 1
    mass = weights.cumsum(-1)
    every = ((logits.double() - largest) / temperature).exp()
    all_kept = every.where(every >= min_p, 0).sum(-1, keepdim=True)
    limited = (top_k > 0) & (top_k < logits.shape[1])
    left = every.sum(-1, keepdim=True).where(~limited, mass.gather(-1, (top_k.long() - 1).clamp(0, _HEAD - 1)))
    rank = torch.arange(_HEAD, device=logits.device)
    kept = known & ((rank < top_k) | ~limited) & (mass - weights < top_p * left) & (weights >= min_p)
    kept_count = kept.sum(-1, keepdim=True)

    # The sum of the kept weights. Where the last kept token is not in the head, it is known up to that token's weight.
    ends = kept_count < count
    head_sum, last = mass.gather(-1, (kept_count - 1).clamp(min=0)), weights.gather(-1, (count - 1).clamp(min=0))
    low, high = (head_sum.where(ends, (top_p * left + more).minimum(all_kept)) for more in (0, last))
    place, same = ((kept & (mass <= numbers * total)).sum(-1, keepdim=True) for total in (low, high))
    found = (place == same) & (ends | (place < count)) & (~limited | (top_k <= count))
    return tokens.gather(-1, place.minimum((kept_count - 1).clamp(min=0))).squeeze(-1), found.squeeze(-1)


def _head(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, tokens and validity, (B, _HEAD) each: as many places of the stable order as are certain.

    topk leaves the order of equal values open, and which of those that equal the last one it returns.
    """
    values, tokens = logits.topk(_HEAD, -1)
    tokens, order = tokens.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order), values > values[:, -1:]


class Constraint(Protocol):
    """Decides which tokens may come next, such as those of a grammar."""

    def mask(self, logits: Tensor) -> None:
        """Set the (vocabulary,) logits of tokens that are not allowed to -inf, in place."""

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""


class LogitShaping:
    """The changes of one row, in this order; it remembers the row's tokens.

    1. repetition_penalty, of tokens of the prompt and of the answer, as in transformers: positive logits are divided by
       it, negative ones multiplied. 2. frequency_penalty for each time that the answer has a token, presence_penalty if
       it has it, as in OpenAI's API. 3. logit_bias is added. 4. `ends` are not allowed before min_new_tokens tokens.
    5. constraint.

    Args:
        prompt: token ids. like: a tensor on the device, whose last dimension is the vocabulary.
        bias: by token. ends: tokens that end the row.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        like: Tensor,
        *,
        repetition_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        bias: Mapping[int, float],
        min_new_tokens: int,
        ends: Collection[int],
        constraint: Constraint | None,
    ):
        self.repetition, self.frequency, self.presence = repetition_penalty, frequency_penalty, presence_penalty
        self.min_new_tokens, self.constraint, self.count = min_new_tokens, constraint, 0
        device: Any = like.device
        self._counts = torch.zeros(like.shape[-1], device=device)
        self._in_prompt = torch.zeros(like.shape[-1], dtype=torch.bool, device=device)
        self._in_prompt[torch.tensor(list(prompt), device=device)] = True
        self._bias = torch.tensor(list(bias.values()), device=device)
        self._biased = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._ends = torch.tensor(list(ends), dtype=torch.int64, device=device)

    def apply(self, logits: Tensor) -> None:
        """Change (vocabulary,) float32 logits in place."""
        answered = self._counts > 0
        if self.repetition != 1:
            repeated = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
            logits.copy_(torch.where(self._in_prompt | answered, repeated, logits))
        if self.frequency or self.presence:
            logits -= self.frequency * self._counts + self.presence * answered
        logits.index_add_(0, self._biased, self._bias)
        if self.count < self.min_new_tokens:
            logits[self._ends] = float("-inf")
        if self.constraint is not None:
            self.constraint.mask(logits)

    def advance(self, token: int) -> None:
        """Take the token that was chosen."""
        self.count += 1
        self._counts[token] += 1
        if self.constraint is not None:
            self.constraint.advance(token)
