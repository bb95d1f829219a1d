"""Policies that choose a worker for a request: one small class each, over plain numbers, without HTTP.

Each pool has its own instance: one for the decode workers, one for the prefill workers of each model.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from qsun.errors import QsunError


class Candidate(Protocol):
    """A worker as a policy sees it.

    Attributes:
        outstanding_tokens: of requests in flight: estimated prompt tokens, and the most that each may still generate.
        taken: number of requests that it ever got.
        models: that it serves; None for all.
    """

    url: str
    outstanding_tokens: int
    taken: int
    models: frozenset[str] | None


W = TypeVar("W", bound=Candidate)


@dataclass(frozen=True)
class Demand:
    """A request as a policy sees it: its model, its prompt tokens, and how its prompt begins ("" where unknown)."""

    model: str
    tokens: int
    beginning: str = ""


class Policy(Protocol):
    def choose(self, workers: Sequence[W], request: Demand) -> W | None:
        """Return one of the workers, or None if none of them may serve the request."""
        ...


class LeastOutstandingTokens:
    """The worker with the fewest outstanding tokens; among equals the one that got the fewest requests."""

    def choose(self, workers: Sequence[W], request: Demand) -> W | None:
        return min(workers, key=lambda worker: (worker.outstanding_tokens, worker.taken), default=None)


class PowerOfTwo:
    """The less loaded of two workers drawn at random: nearly as even, and stable if routers share the workers."""

    def __init__(self, seed: int | None = None):
        self._random = random.Random(seed)

    def choose(self, workers: Sequence[W], request: Demand) -> W | None:
        drawn = self._random.sample(list(workers), min(2, len(workers)))
        return min(drawn, key=lambda worker: (worker.outstanding_tokens, worker.taken), default=None)


class RoundRobin:
    """The worker whose last request is the oldest, regardless of load."""

    def __init__(self) -> None:
        self._turn = 0
        self._last: dict[str, int] = {}

    def choose(self, workers: Sequence[W], request: Demand) -> W | None:
        chosen = min(workers, key=lambda worker: self._last.get(worker.url, 0), default=None)
        if chosen is not None:
            self._turn += 1
            self._last[chosen.url] = self._turn
        return chosen


class PrefixAffinity:
    """The worker whose prefix cache has probably seen how the prompt begins: always the same one for a beginning.

    Rendezvous hashing, so that every router prefers the same worker, and a worker that joins or leaves moves only the
    beginnings that it gets or had. A worker with `slack_tokens` more outstanding than another loses its claim.
    """

    def __init__(self, slack_tokens: int = 8192):
        self.slack_tokens = slack_tokens
        self._otherwise = LeastOutstandingTokens()

    def choose(self, workers: Sequence[W], request: Demand) -> W | None:
        least = self._otherwise.choose(workers, request)
        if least is None or not request.beginning:
            return least
        claimant = max(workers, key=lambda worker: _weight(worker.url, request.beginning))
        behind = claimant.outstanding_tokens - least.outstanding_tokens
        return claimant if behind <= self.slack_tokens else least


def _weight(worker: str, beginning: str) -> bytes:
    key = hashlib.blake2b(worker.encode()).digest()  # as long as a key may be; URLs may be longer
    return hashlib.blake2b(beginning.encode("utf-8", "replace"), key=key, digest_size=8).digest()


class Partitioned:
    """Conventional disaggregation, for comparison: a decode worker serves its own models only."""

    def __init__(self) -> None:
        self._among = LeastOutstandingTokens()

    def choose(self, workers: Sequence[W], request: Demand) -> W | None:
        own = [worker for worker in workers if worker.models is None or request.model in worker.models]
        return self._among.choose(own, request)


_POLICIES: dict[str, type[Policy]] = {
    "least_outstanding_tokens": LeastOutstandingTokens,
    "power_of_two": PowerOfTwo,
    "round_robin": RoundRobin,
    "partitioned": Partitioned,
    "prefix_affinity": PrefixAffinity,
}


def make_policy(name: str) -> Policy:
    """Return a policy by its name in cluster.yaml. Raises QsunError for an unknown name."""
    if name not in _POLICIES:
        raise QsunError(f"policy {name!r} is unknown; use one of {', '.join(_POLICIES)}")
    return _POLICIES[name]()


def partition(workers: Sequence[str], models: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return the models of each decode worker if the file assigns none: worker i serves model i modulo their number."""
    return {url: frozenset([models[i % len(models)]]) for i, url in enumerate(workers)}
