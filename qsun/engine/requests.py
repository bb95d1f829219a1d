"""What the engine is asked and what it answers: requests, and the updates that come back."""

import time
from dataclasses import dataclass, field
from typing import Any

from qsun.engine.config import Sampling
from qsun.errors import QsunError
from qsun.runtime.rotary import rope_boundary


class Full(QsunError):
    """The queue is full; try again later."""


class Refused(QsunError):
    """The model is not served, or is being removed."""


@dataclass(frozen=True)
class Request:
    """One prompt for one model.

    Attributes:
        id: the caller's, unique among those that run.
        model: name of a prefill module. tokens: the prompt.
        seconds: time limit, after which it ends wherever it is.
        arrived: on time.monotonic's clock.
    """

    id: str
    model: str
    tokens: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    seconds: float = 600.0
    arrived: float = field(default_factory=time.monotonic)

    @property
    def prefix_tokens(self) -> int:
        """What the prefill module reads: all but the last token."""
        return len(self.tokens) - 1

    @property
    def kv_tokens(self) -> int:
        """Columns of KV that it can come to need: the last token chosen is never fed."""
        return self.prefix_tokens + max(1, self.sampling.max_new_tokens)

    @property
    def deadline(self) -> float:
        return self.arrived + self.seconds


def check_prompt(request: Request, config: Any, name: str) -> None:
    """Raise QsunError for an empty prompt, one too long for the model with its answer, and unknown token ids."""
    tokens, new, limit = request.tokens, request.sampling.max_new_tokens, config.max_position_embeddings
    if not tokens:
        raise QsunError(f"{name} is empty; the decode module must be fed at least one token")
    if request.kv_tokens > limit:
        raise QsunError(
            f"{name} has {len(tokens)} tokens, and max_new_tokens {new} goes over the model's {limit} positions; "
            + (f"use {limit + 1 - len(tokens)} or less" if len(tokens) <= limit else "shorten it")
        )
    _check_boundary(request, rope_boundary(config), name)
    named = {
        name: tokens,
        "logit_bias": [token for token, _ in request.sampling.logit_bias],
        "stop_token_ids": request.sampling.stop_token_ids,
    }
    for where, given in named.items():
        bad = next((token for token in given if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            raise QsunError(f"{where} has token {bad}, outside the model's vocabulary of {config.vocab_size}")


def most_new_tokens(config: Any, budget_tokens: int, prompt_tokens: int) -> int:
    """Return how many new tokens a prompt of this length can have at most; 0 or less where it does not fit."""
    boundary, limit = rope_boundary(config), min(config.max_position_embeddings, budget_tokens)
    if boundary is not None and prompt_tokens - 1 <= boundary:
        limit = min(limit, boundary)
    return limit + 1 - prompt_tokens


def _check_boundary(request: Request, boundary: int | None, name: str) -> None:
    """Raise QsunError for a request that would need both sets of rotary frequencies."""
    prompt, prefix = len(request.tokens), request.prefix_tokens
    if boundary is None or request.kv_tokens <= boundary:
        return
    if prefix <= boundary:
        fix = f"use {boundary - prefix} or less, or a longer prompt" if prefix < boundary else "use another length"
        raise QsunError(
            f"{name} has {prompt} tokens, and max_new_tokens {request.sampling.max_new_tokens} crosses the model's "
            f"{boundary} tokens, where its RoPE (longrope) changes; {fix}"
        )
    if request.sampling.prompt_logprobs is not None:
        raise QsunError(
            f"{name} has {prompt} tokens, and the model's RoPE (longrope) changes at {boundary}; prompt_logprobs of "
            "prompts beyond it are not supported"
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token, and the most likely tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What one step gave a request.

    Attributes:
        tokens: usually one; none where it only ended. text: what can be shown now; may be empty.
        finish: "", "eos", "stop", "length", "timeout" or "error".
        error: one line, where finish is "timeout" or "error".
        cached_tokens: of the prompt, read from the prefix cache; prompt_logprobs: of its tokens from the second on.
            Both in the first update.
    """

    request: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: str = ""
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
