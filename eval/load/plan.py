"""Which requests a load generator sends: schedules, and prompts of wanted lengths for a tokenizer it does not know."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from qsun.data.jsonl import read_rows, text_of
from qsun.errors import QsunError
from qsun.eval.load.client import Planned, Target
from qsun.eval.load.workload import Workload

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PROBES = (16, 64)  # pieces


@dataclass(frozen=True)
class Pieces:
    """How many tokens random prompts take: `fixed` + `each` for every piece, a letter and a space."""

    fixed: float = 0.0
    each: float = 1.0

    def count(self, tokens: int) -> int:
        """Pieces of a prompt of so many tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.each))


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: rows of a file in the place of random ones where there are any."""

    endpoint: str
    pieces: Pieces = Pieces()
    rows: Sequence[Mapping[str, Any]] = ()

    def make(self, tokens: int, which: random.Random, letters: random.Random) -> Mapping[str, Any]:
        """{"prompt": ...} or {"messages": ...}, and max_tokens and model where a row has them.

        Args:
            which: draws the row. letters: draws those of a random prompt.
        """
        if self.rows:
            return which.choice(self.rows)
        return said(self.endpoint, _letters(self.pieces.count(tokens), letters))


def said(endpoint: str, text: str) -> dict[str, Any]:
    """A text as the body of an endpoint has it."""
    return {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}


def _letters(count: int, random_: random.Random) -> str:
    return " ".join(random_.choices(_LETTERS, k=count))


def plan(
    workload: Workload, prompts: PromptSource, rate: float, requests: int, warm_up: int, prompt_seed: str
) -> list[Planned]:
    """`warm_up` and then `requests` requests at `rate`; an infinite rate has all due at 0, for a closed loop.

    Args:
        prompt_seed: of the letters of random prompts alone. Everything else is the workload's, whose seed may be used
            again on a server; the same letters again would be found in its cache of prefixes.
    """
    which = random.Random(f"{workload.seed} prompts of the load")
    letters = random.Random(f"{prompt_seed} letters")
    planned = []
    for number, request in enumerate(workload.trace(rate, warm_up + requests)):
        what = dict(prompts.make(request.prompt_tokens, which, letters))
        model, most = what.pop("model", request.model), what.pop("max_tokens", request.output_tokens)
        planned.append(Planned(request.arrival, model, what, most, number < warm_up))
    return planned


def read_prompts(path: Path, endpoint: str) -> list[dict[str, Any]]:
    """Rows with "prompt", or "messages" for chat, and optionally "model" and "max_tokens"; other keys are left out.

    Raises:
        QsunError: a row without, or with values that are none; names file and line.
    """
    wanted = "messages" if endpoint == "chat" else "prompt"
    found = []
    for where, row in read_rows(path, "prompts"):
        if endpoint == "chat" and "messages" not in row and "prompt" in row:
            kept = said(endpoint, text_of(row, "prompt", where))
        elif wanted not in row:
            raise QsunError(f"{where}: no {wanted!r}; --endpoint {endpoint} needs it")
        else:
            kept = {wanted: row[wanted]}
        if "model" in row:
            kept["model"] = text_of(row, "model", where)
        if "max_tokens" in row:
            if not isinstance(row["max_tokens"], int) or row["max_tokens"] < 1:
                raise QsunError(f"{where}: max_tokens {row['max_tokens']!r} is no whole number from 1 up")
            kept["max_tokens"] = row["max_tokens"]
        found.append(kept)
    if not found:
        raise QsunError(f"prompts file {path} has no rows")
    return found


async def served_models(target: Target) -> tuple[str, ...]:
    """Names in the server's /v1/models, in its order. Raises QsunError where it has none or does not answer."""
    answer = await _asked(target, "GET", "models")
    names = tuple(str(model["id"]) for model in answer.get("data", []))
    if not names:
        raise QsunError(f"{target.url} serves no models; name them with --models")
    return names


async def probe_pieces(target: Target, model: str) -> Pieces | None:
    """Ask a server how many tokens two random prompts take. None where its answers have no usage.

    Raises:
        QsunError: the server does not answer, or answers with an error.
    """
    path = "chat/completions" if target.endpoint == "chat" else "completions"
    counts = []
    for pieces in _PROBES:
        text = _letters(pieces, random.Random(pieces))
        body = {"model": model, **said(target.endpoint, text), "max_tokens": 1, "temperature": 0}
        usage = (await _asked(target, "POST", path, body)).get("usage") or {}
        counts.append(int(usage.get("prompt_tokens") or 0))
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
        raise QsunError(f"{target.address(path)} answers with something else than JSON") from None
    if not isinstance(found, dict):
        raise QsunError(f"{target.address(path)} answers {answer.status_code}: {answer.text:.200}")
    return found
