"""The requests that a load generator sends: when, and prompts of a wanted length for an unknown tokenizer."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qsun.data.jsonl import read_rows, text_of
from qsun.errors import QsunError
from qsun.eval.load.client import PlannedRequest, Target, check_sendable
from qsun.eval.load.workload import Workload
from qsun.serve.http.wire import BrokenStream, usage_count

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PROBES = (16, 64)  # pieces


@dataclass(frozen=True)
class Pieces:
    """Tokens of a random prompt: `fixed`, and `each` for every piece, which is a letter and a space."""

    fixed: float = 0.0
    each: float = 1.0

    def count(self, tokens: int) -> int:
        """Return the number of pieces of a prompt of this many tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.each))


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: the rows of a file if there are any, else random letters."""

    endpoint: str
    pieces: Pieces = Pieces()
    rows: Sequence[Mapping[str, Any]] = ()

    def make(self, tokens: int, which: random.Random, letters: random.Random) -> Mapping[str, Any]:
        """Return {"prompt": ...} or {"messages": ...}, with max_tokens and model if a row has them.

        Args:
            which: draws a row. letters: draws a random prompt.
        """
        if self.rows:
            return which.choice(self.rows)
        return prompt_fields(self.endpoint, _letters(self.pieces.count(tokens), letters))


def prompt_fields(endpoint: str, text: str) -> dict[str, Any]:
    """Return a text as the body of a request to this endpoint has it."""
    return {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}


def _letters(count: int, random_: random.Random) -> str:
    return " ".join(random_.choices(_LETTERS, k=count))


def plan_requests(
    workload: Workload, prompts: PromptSource, rate: float, requests: int, warm_up: int, prompt_seed: str
) -> list[PlannedRequest]:
    """Return `warm_up` and then `requests` requests at `rate`; at an infinite rate (a closed loop) all are due at 0.

    Args:
        prompt_seed: decides only the letters of random prompts. The workload's seed decides the rest and may be used
            again on the same server; with the same letters, its prefix cache would hold the prompts.
    """
    which = random.Random(f"{workload.seed} prompts of the load")
    letters = random.Random(f"{prompt_seed} letters")
    planned = []
    for number, request in enumerate(workload.trace(rate, warm_up + requests)):
        fields = dict(prompts.make(request.prompt_tokens, which, letters))
        model, most = fields.pop("model", request.model), fields.pop("max_tokens", request.output_tokens)
        planned.append(PlannedRequest(request.arrival, model, fields, most, number < warm_up))
    return planned


def read_prompts(path: Path, endpoint: str) -> list[dict[str, Any]]:
    """Read rows with "prompt", or "messages" for chat, and optionally "model" and "max_tokens"; ignore other keys.

    Raises:
        QsunError: a row without a prompt, or with an invalid value; names file and line.
    """
    wanted = "messages" if endpoint == "chat" else "prompt"
    found = []
    for where, row in read_rows(path, "prompts"):
        if endpoint == "chat" and "messages" not in row and "prompt" in row:
            kept = prompt_fields(endpoint, text_of(row, "prompt", where))
        elif wanted not in row:
            raise QsunError(f"{where}: no {wanted!r}; --endpoint {endpoint} needs it")
        else:
            kept = {wanted: row[wanted]}
        if "model" in row:
            kept["model"] = text_of(row, "model", where)
        if "max_tokens" in row:
            if not isinstance(row["max_tokens"], int) or row["max_tokens"] < 1:
                raise QsunError(f"{where}: max_tokens {row['max_tokens']!r} is not a whole number from 1 up")
            kept["max_tokens"] = row["max_tokens"]
        check_sendable(kept, where)
        found.append(kept)
    if not found:
        raise QsunError(f"prompts file {path} has no rows")
    return found


async def served_models(target: Target) -> tuple[str, ...]:
    """Return the names in the server's /v1/models. Raises QsunError if there are none or it does not answer."""
    answer = await _asked(target, "GET", "models")
    names = tuple(str(model["id"]) for model in answer.get("data", []))
    if not names:
        raise QsunError(f"{target.url} serves no models; name them with --models")
    return names


async def probe_pieces(target: Target, model: str) -> Pieces | None:
    """Find out how many tokens a random prompt takes, from two of them; None if the server reports no usage.

    Raises:
        QsunError: the server does not answer, or answers with an error.
    """
    counts = []
    for pieces in _PROBES:
        text = _letters(pieces, random.Random(pieces))
        body = {"model": model, **prompt_fields(target.endpoint, text), "max_tokens": 1, "temperature": 0}
        answer = await _asked(target, "POST", target.path, body)
        try:
            counts.append(usage_count(answer, "prompt_tokens") or 0)
        except BrokenStream as broken:
            raise QsunError(f"{target.address(target.path)}: {broken}") from None
    if not 0 < counts[0] < counts[1]:
        return None
    each = (counts[1] - counts[0]) / (_PROBES[1] - _PROBES[0])
    return Pieces(counts[0] - each * _PROBES[0], each)


async def _asked(target: Target, method: str, path: str, body: Any = None) -> dict[str, Any]:
    try:
        async with target.client() as client:
            answer = await client.request(method, target.address(path), json=body)
            found = answer.json() if answer.status_code == 200 else None
    except httpx.HTTPError as error:
        raise QsunError(f"{target.url} does not answer: {error or type(error).__name__}") from None
    except ValueError:
        raise QsunError(f"{target.address(path)} answers with something other than JSON") from None
    if not isinstance(found, dict):
        raise QsunError(f"{target.address(path)} answers {answer.status_code}: {answer.text:.200}")
    return found
