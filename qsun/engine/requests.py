"""What the engine is asked and what it answers: requests, their settings, and the updates that come back."""

import time
from dataclasses import dataclass, field

from qsun.engine.generation import GenerateConfig
from qsun.errors import QsunError

MOST_LOGPROBS = 20


class Full(QsunError):
    """The queue is full; try again later."""


class Refused(QsunError):
    """No such model, or one that is being removed."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen; as in GenerateConfig, for one prompt.

    Attributes:
        ignore_eos: go on past the model's end token.
        logprobs: None for none; otherwise the log-probability of each token and of this many most likely ones, of the
            model's own distribution, before temperature, top_p and top_k.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        shared = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
        GenerateConfig(**{name: getattr(self, name) for name in shared})  # one place says what is in range
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise QsunError(f"logprobs {self.logprobs} is out of range; use 0 to {MOST_LOGPROBS}")


@dataclass(frozen=True)
class Request:
    """One prompt for one model.

    Attributes:
        id: the caller's, unique among those that run.
        model: name of a prefill module. tokens: the prompt.
        seconds: after which it is given up, wherever it is then.
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
