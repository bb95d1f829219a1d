"""What the router knows of one worker: its identity, whether it answers, and its load."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Role = Literal["prefill", "decode", "aggregated"]
State = Literal["unchecked", "ready", "refused", "down"]
Circuit = Literal["closed", "open", "half_open"]


class Breaker:
    """A circuit breaker: opens after `failures` in a row; after a cool-down a probe decides whether it closes."""

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

    def trip(self) -> None:
        """Open the circuit now."""
        self._opened_at = self._clock()

    def fail(self) -> bool:
        """Count a failure. Return whether it opens the circuit, or keeps it open after a probe."""
        self.failures += 1
        opens = self.state == "half_open" or (self._opened_at is None and self.failures >= self.limit)
        if opens:
            self.trip()
        return opens


class Worker:
    """One vLLM worker.

    Attributes:
        role: aggregated: one engine that reads prompts with adapters and answers by itself, without a transfer.
        served_name: the model name that it must serve, which identifies the module of its pool.
        model: of a prefill worker; None for a decode worker, and for one that serves adapters.
        adapters: of a worker that reads prompts with them, its model names by the router's.
        lacking: models whose adapter it does not list.
        models: that a decode worker serves; None for all.
        state: ready: its identity is checked. refused: it serves another module. down: it does not answer.
        reason: for its state, for people.
        suspected: a request to it timed out, and no probe has shown yet whether it hangs or is only slow.
        leaving: no longer in the file; its running requests may finish.
        outstanding_tokens, in_flight, taken: its load (see policies.py).
        max_model_len: prompt and answer together, in tokens, as it reports.
        epoch: raised whenever its process may be a new one, which invalidates earlier findings.
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
        adapters: Mapping[str, str] | None = None,
    ):
        self.url, self.role, self.served_name, self.breaker = url, role, served_name, breaker
        self.model, self.models = model, models
        self.adapters: Mapping[str, str] = adapters or {}
        self.lacking: frozenset[str] = frozenset()
        self.state: State = "unchecked"
        self.reason = "not yet checked"
        self.suspected = self.leaving = False
        self.outstanding_tokens = self.in_flight = self.taken = 0
        self.max_model_len: int | None = None
        self.epoch = 0
        self.engine_ids: set[str] = set()

    def name_of(self, model: str) -> str:
        """Return the name under which it serves a model of the router.

        Raises:
            KeyError: it serves adapters, and none of that model: under its own name it would answer as the base.
        """
        return self.adapters[model] if self.adapters or self.role == "aggregated" else self.served_name

    def serve_adapters(self, adapters: Mapping[str, str]) -> None:
        """Take the adapters of another file; those that it had not before are lacking until a check has found them."""
        new = {model for model, name in adapters.items() if self.adapters.get(model) != name}
        self.lacking = frozenset((self.lacking | new) & adapters.keys())
        self.adapters = adapters

    def prefills(self, model: str) -> bool:
        """Whether it is of the pool that reads a model's prompts."""
        return model == self.model or model in self.adapters

    @property
    def usable(self) -> bool:
        return self.state == "ready" and not self.leaving and self.breaker.state == "closed"

    @contextmanager
    def handling(self, tokens: int) -> Iterator["TokenLoad"]:
        """Count a request of so many tokens as this worker's load within the block."""
        load = TokenLoad(self, tokens)
        self.in_flight += 1
        self.taken += 1
        self.outstanding_tokens += tokens
        try:
            yield load
        finally:
            self.in_flight -= 1
            self.outstanding_tokens -= load.left


class TokenLoad:
    """The tokens that one request still needs from a worker."""

    def __init__(self, worker: Worker, tokens: int):
        self._worker, self.left = worker, tokens

    def done(self, tokens: int) -> None:
        """Subtract tokens that have arrived, down to 0."""
        tokens = min(tokens, self.left)
        self.left -= tokens
        self._worker.outstanding_tokens -= tokens
