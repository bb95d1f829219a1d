"""What the router knows of one worker: whether it is what it should be, whether it answers, how much it has to do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Role = Literal["prefill", "decode"]
State = Literal["unchecked", "ready", "refused", "down"]
Circuit = Literal["closed", "open", "half_open"]


class Breaker:
    """A circuit breaker: opens after `failures` in a row; after a cool-down one probe decides whether it closes."""

    def __init__(self, failures: int, cool_down_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.limit, self.cool_down_seconds, self._clock = failures, cool_down_seconds, clock
        self.failures = 0
        self._opened_at: float | None = None

    @property
    def state(self) -> Circuit:
        if self._opened_at is None:
            return "closed"
        return "half_open" if self._clock() - self._opened_at >= self.cool_down_seconds else "open"

    def succeed(self) -> None:
        self.failures = 0
        self._opened_at = None

    def fail(self) -> bool:
        """Count a failure. True where it opens the circuit, or keeps it open after a probe."""
        self.failures += 1
        opens = self.state == "half_open" or (self._opened_at is None and self.failures >= self.limit)
        if opens:
            self._opened_at = self._clock()
        return opens


class Worker:
    """One vLLM worker.

    Attributes:
        url, role: where it is, and what for.
        served_name: the name that it must serve: that of the module of this pool.
        model: of a prefill worker; None for a decode worker.
        models: that a decode worker takes; None for all.
        state: ready once its identity was checked. refused: it serves something else. down: it does not answer.
        reason: for its state, for people.
        leaving: no longer in the file; what it has in flight may finish.
        outstanding_tokens, in_flight, taken: its load (see policies.py).
        max_model_len: tokens of prompt and answer together, as it says itself.
        epoch: raised whenever its process may have become another one; what was found out before is of the past.
        engine_ids: of a prefill worker's process (several with data parallelism); a new one is a restart.
    """

    def __init__(
        self,
        url: str,
        role: Role,
        served_name: str,
        breaker: Breaker,
        model: str | None = None,
        models: frozenset[str] | None = None,
    ):
        self.url, self.role, self.served_name, self.breaker = url, role, served_name, breaker
        self.model, self.models = model, models
        self.state: State = "unchecked"
        self.reason = "not yet checked"
        self.leaving = False
        self.outstanding_tokens = self.in_flight = self.taken = 0
        self.max_model_len: int | None = None
        self.epoch = 0
        self.engine_ids: set[str] = set()

    @property
    def usable(self) -> bool:
        return self.state == "ready" and not self.leaving and self.breaker.state == "closed"

    @contextmanager
    def carrying(self, tokens: int) -> Iterator["Burden"]:
        """A request is at this worker, with so many tokens to do, until the block is left."""
        burden = Burden(self, tokens)
        self.in_flight += 1
        self.taken += 1
        self.outstanding_tokens += tokens
        try:
            yield burden
        finally:
            self.in_flight -= 1
            self.outstanding_tokens -= burden.left


class Burden:
    """What one request still has to do at a worker."""

    def __init__(self, worker: Worker, tokens: int):
        self._worker, self.left = worker, tokens

    def done(self, tokens: int) -> None:
        """So many tokens have come. More than were announced are not counted."""
        tokens = min(tokens, self.left)
        self.left -= tokens
        self._worker.outstanding_tokens -= tokens
