"""Requests as a load generator sends them and a simulator receives them: when, to which model, and how long."""

import itertools
import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qsun.data.jsonl import read_rows
from qsun.errors import QsunError

_FORMS = "use fixed:N, uniform:A-B or lognormal:MEDIAN,SIGMA[,MAX], such as lognormal:200,0.8,1000"
_MOST_TOKENS = 1_000_000


class TracedRequest(NamedTuple):
    """A request of a trace. arrival: seconds from its start; output_tokens: how many it will produce."""

    arrival: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, from 1 up.

    Attributes:
        kind: "fixed" (low), "uniform" (low to high, both included) or "lognormal" (median low, sigma of the logarithm).
        most: longer draws are cut to this.
    """

    kind: str
    low: int
    high: int = 0
    sigma: float = 0.0
    most: int = _MOST_TOKENS

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Parse fixed:N, uniform:A-B or lognormal:MEDIAN,SIGMA[,MAX]. Raises QsunError for anything else."""
        kind, _, rest = text.partition(":")
        try:
            if kind == "fixed":
                found = cls(kind, int(rest))
            elif kind == "uniform":
                low, high = rest.split("-")
                found = cls(kind, int(low), int(high))
            else:
                median, sigma, *most = rest.split(",")
                found = cls(kind, int(median), 0, float(sigma), int(most[0]) if most else _MOST_TOKENS)
        except ValueError:
            raise QsunError(f"lengths {text!r} are invalid; {_FORMS}") from None
        known = kind in ("fixed", "uniform", "lognormal") and text.count(",") <= 2
        if not known or not 1 <= found.low <= found.most <= _MOST_TOKENS or not 0 <= found.sigma < 10:
            raise QsunError(f"lengths {text!r} are out of range; {_FORMS}")
        if kind == "uniform" and not found.low <= found.high <= _MOST_TOKENS:
            raise QsunError(f"lengths {text!r} end before they begin; {_FORMS}")
        return found

    def draw(self, random_: random.Random) -> int:
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return random_.randint(self.low, self.high)
        return min(self.most, max(1, round(self.low * math.exp(random_.gauss(0.0, self.sigma)))))


def zipf_shares(models: Sequence[str], skew: float) -> dict[str, float]:
    """Return each model's share of the requests: the k-th has weight k ** -skew; 0 is uniform."""
    if not models:
        raise QsunError("no models are given; name at least one")
    if len(set(models)) < len(models):
        raise QsunError(f"models {','.join(models)} contain a duplicate; name each once")
    if not 0 <= skew <= 20:
        raise QsunError(f"skew {skew:g} is out of range; use 0 (uniform) to 20")
    weights = [rank**-skew for rank in range(1, len(models) + 1)]
    return {model: weight / math.fsum(weights) for model, weight in zip(models, weights, strict=True)}


@dataclass(frozen=True)
class Workload:
    """Requests of several models: Poisson arrivals, Zipf shares, lengths that do not depend on the model.

    The same seed draws the same gaps (in units of their mean) and lengths for every rate and skew, so that systems,
    rates and skews are compared on identical random draws.
    """

    models: tuple[str, ...]
    skew: float
    prompt: Lengths
    output: Lengths
    seed: int = 0

    def shares(self) -> dict[str, float]:
        return zipf_shares(self.models, self.skew)

    def sample(self) -> list[TracedRequest]:
        """Draw 1,000 requests, for their lengths."""
        return self.trace(1.0, 1000)

    def trace(self, rate: float, requests: int) -> list[TracedRequest]:
        """Draw `requests` arrivals at `rate` a second; at an infinite rate all arrive at 0."""
        if not rate > 0:
            raise QsunError(f"rate {rate:g} is out of range; use more than 0 requests a second")
        if requests < 1:
            raise QsunError(f"requests {requests} is out of range; use 1 or more")
        gaps, which, prompts, outputs = (
            random.Random(f"{self.seed} {part}") for part in ("gaps", "which", "prompts", "outputs")
        )
        cumulative = list(itertools.accumulate(self.shares().values()))
        now, found = 0.0, []
        for _ in range(requests):
            now += gaps.expovariate(1.0) / rate
            rank = min(bisect_left(cumulative, which.random()), len(self.models) - 1)
            found.append(TracedRequest(now, self.models[rank], self.prompt.draw(prompts), self.output.draw(outputs)))
        return found


def read_trace(path: Path) -> list[TracedRequest]:
    """Read a trace in order of arrival: rows with arrival, model, prompt_tokens and output_tokens.

    requests.jsonl of `qsun bench serve` is one; its warm-up and failed requests are left out. The first arrival
    becomes 0.

    Raises:
        QsunError: a missing key, or an invalid value; names file and line.
    """
    found = []
    for where, row in read_rows(path, "trace"):
        if row.get("warm_up") or row.get("error"):
            continue
        try:
            request = TracedRequest(
                float(row["arrival"]), str(row["model"]), int(row["prompt_tokens"]), int(row["output_tokens"])
            )
        except KeyError as error:
            raise QsunError(f"{where}: no {error.args[0]!r}; a row has {', '.join(TracedRequest._fields)}") from None
        except (TypeError, ValueError, OverflowError):
            raise QsunError(f"{where}: arrival, prompt_tokens and output_tokens must be numbers") from None
        if not (0 <= request.arrival < math.inf and request.prompt_tokens >= 1 and request.output_tokens >= 1):
            raise QsunError(f"{where}: {request} is out of range; arrival from 0, tokens from 1 up")
        found.append(request)
    if not found:
        raise QsunError(f"trace file {path} has no requests; write a row for each")
    found.sort(key=lambda request: request.arrival)
    return [request._replace(arrival=request.arrival - found[0].arrival) for request in found]
