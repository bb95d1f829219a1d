"""What the engine is asked and what it answers: requests, their settings, and the updates that come back."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qsun.errors import QsunError

MOST_LOGPROBS = 20


class Full(QsunError):
    """The queue is full; try again later."""


class Refused(QsunError):
    """The model is not served, or is being removed."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen and when it ends.

    Attributes:
        temperature: 0 is greedy. top_p, top_k: what sampling keeps; 1.0 and 0 keep all.
        stop: strings that end the answer, which ends before them.
        ignore_eos: go on past the model's end token.
        logprobs: None for none; otherwise the log-probability of each token and of this many most likely ones, of the
            model's own distribution, before all other settings.
        detokenize: make text, in which `stop` is looked for. skip_special_tokens: leave special tokens out of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        check_ranges(
            self,
            max_new_tokens=(self.max_new_tokens >= 1, "1 or more"),
            temperature=(0 <= self.temperature < float("inf"), "0 or more"),
            top_p=(0 < self.top_p <= 1, "more than 0, at most 1"),
            top_k=(self.top_k >= 0, "0 (all) or more"),
            stop=(all(self.stop), "strings that are not empty"),
            logprobs=(self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
        )


def check_ranges(settings: object, **checks: tuple[bool, str]) -> None:
    """Raise QsunError for a setting that is out of range. checks: by name, whether it is in range, and the range."""
    for name, (good, limits) in checks.items():
        if not good:
            raise QsunError(f"{name} {getattr(settings, name)!r} is out of range; use {limits}")


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
        return self.prefix_tokens + self.sampling.max_new_tokens

    @property
    def deadline(self) -> float:
        return self.arrived + self.seconds


def check_prompt(request: Request, config: Any, name: str) -> None:
    """Raise QsunError for a prompt that is empty, too long for the model with its answer, or has unknown token ids."""
    tokens, new, limit = request.tokens, request.sampling.max_new_tokens, config.max_position_embeddings
    if not tokens:
        raise QsunError(f"{name} is empty; the decode module must be fed at least one token")
    if request.kv_tokens > limit:
        raise QsunError(
            f"{name} has {len(tokens)} tokens, and max_new_tokens {new} goes over the model's {limit} positions; "
            + (f"use {limit + 1 - len(tokens)} or less" if len(tokens) <= limit else "shorten it")
        )
    if min(tokens) < 0 or max(tokens) >= config.vocab_size:
        bad = min(tokens) if min(tokens) < 0 else max(tokens)
        raise QsunError(f"{name} has token {bad}, outside the model's vocabulary of {config.vocab_size}")


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
        cached_tokens: of the prompt, read from the prefix cache; in the first update.
    """

    request: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: str = ""
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
