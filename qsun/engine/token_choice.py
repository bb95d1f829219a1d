"""How rows choose their next tokens: each by its own request's settings and random numbers."""

from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from qsun.engine.requests import TokenLogprob
from qsun.engine.row import DecodeRow
from qsun.runtime.tokens.sampling import draw

_PARTS = 64  # of a row of logits


class ChosenToken(NamedTuple):
    """A row's next token, its log-probability where that is wanted, and what went wrong ("" if nothing did)."""

    token: int
    logprob: TokenLogprob | None
    error: str


def choose(logits: Tensor, rows: Sequence[DecodeRow], eos: Set[int] = frozenset()) -> list[ChosenToken]:
    """Choose a token for each row of (B, vocabulary) logits and let the row take it. eos: the model's end tokens."""
    tokens = most_likely(logits)
    shaped = [place for place, row in enumerate(rows) if row.request.sampling.shapes_logits]
    final, errors = logits, [""] * len(rows)
    if shaped:
        final, known = logits.float().clone(), tokens.tolist()
        shaped = [place for place in shaped if known[place] >= 0]
        for place in shaped:
            errors[place] = rows[place].shape(final[place], eos)
        tokens[shaped] = final[shaped].argmax(-1)
    drawing = [place for place, row in enumerate(rows) if row.random is not None]
    if len(drawing) == len(rows):
        tokens = _drawn(final, rows).where(tokens >= 0, -1)
    elif drawing:
        drawn = _drawn(final[drawing], [rows[place] for place in drawing])
        tokens[drawing] = drawn.where(tokens[drawing] >= 0, -1)
    known = tokens.tolist()
    errors = [
        "the model computed NaN or Inf for this prompt" if token < 0 else error
        for token, error in zip(known, errors, strict=True)
    ]
    logprobs = _logprobs(logits, tokens.clamp(min=0), rows)
    choices = []
    for place, (row, token) in enumerate(zip(rows, (max(0, token) for token in known), strict=True)):
        failure = row.advance(token)
        choices.append(ChosenToken(token, logprobs.get(place), errors[place] or failure))
    return choices


def most_likely(logits: Tensor) -> Tensor:
    """Return the first most likely token of each row of (B, vocabulary) logits, int64 (B,).

    -1: the row's largest logit is NaN or Inf. In two stages where it can: a GPU would give each row to a few threads.
    """
    if logits.is_cuda and logits.shape[1] % _PARTS == 0:
        parts, places = logits.unflatten(1, (_PARTS, -1)).max(-1)
        best, part = parts.max(-1)
        tokens = part * (logits.shape[1] // _PARTS) + places.gather(1, part[:, None])[:, 0]
    else:
        best, tokens = logits.max(-1)
    return torch.where(best.isfinite(), tokens, -1)


def _drawn(logits: Tensor, rows: Sequence[DecodeRow]) -> Tensor:
    settings = []
    for row in rows:
        number = torch.rand(1, generator=row.random, dtype=torch.float64).item()
        own = row.request.sampling
        settings.append((number, own.temperature, own.top_p, own.top_k, own.min_p))
    # one transfer: each would make the host wait
    return draw(logits, *torch.tensor(settings, dtype=torch.float64).to(logits.device).unbind(1))


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[DecodeRow]) -> dict[int, TokenLogprob]:
    """Log-probabilities by place, where they are wanted."""
    asked = {place: row.request.sampling.logprobs for place, row in enumerate(rows)}
    wanted = {place: count for place, count in asked.items() if count is not None}
    if not wanted:
        return {}
    places = list(wanted)
    return dict(zip(places, token_logprobs(logits[places], tokens[places], list(wanted.values())), strict=True))


def token_logprobs(logits: Tensor, tokens: Tensor, tops: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability of a token and of the most likely ones, by the model's own distribution.

    Args:
        logits: (N, vocabulary). tokens: (N,). tops: how many of the most likely tokens, for each.
    """
    known = logits.float().log_softmax(-1)
    own = known.gather(1, tokens[:, None]).squeeze(1).tolist()
    best = known.topk(min(max(tops), known.shape[1]), -1)
    rows = zip(tokens.tolist(), own, best.indices.tolist(), best.values.tolist(), tops, strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(indices[:top], values[:top], strict=True)))
        for token, value, indices, values, top in rows
    ]
