"""`qsun bench serve`: one server under load, or two in alternate rounds of the same load."""

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qsun.data.jsonl import check_text
from qsun.errors import QsunError
from qsun.eval.load.client import Record, Target
from qsun.eval.load.generator import closed_loop, open_loop
from qsun.eval.load.plan import Pieces, PromptSource, plan_requests, probe_pieces, served_models
from qsun.eval.load.report import geometric_means, load_summary, ratios
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.load.workload import Lengths, Workload, zipf_shares
from qsun.progress import Note, Progress

_LATE_MS = 20.0  # a note says when requests are sent later than this
OURS, THEIRS = "url", "against"


@dataclass(frozen=True)
class LoadSettings:
    """What to send.

    Attributes:
        prompt, output: lengths in tokens. models: the busiest first; empty: all that the server lists.
        rows: prompts of a file instead of random ones.
        rate: requests/s of an open loop; or concurrency: of a closed loop. The other is 0.
        requests, warm_up: requests of each round to measure, and to send before them.
        rounds: on each server; each draws its own arrivals and prompts.
        seed: of arrivals, models and lengths, and of the choice among `rows`.
        prompt_seed: of the letters of random prompts, which differ by round and server; empty: a fresh one for this
            run, because the server may have cached the prompts of an earlier one.
    """

    prompt: Lengths
    output: Lengths
    models: tuple[str, ...] = ()
    skew: float = 1.0
    rows: Sequence[Mapping[str, Any]] = ()
    rate: float = 0.0
    concurrency: int = 0
    requests: int = 100
    warm_up: int = 8
    rounds: int = 1
    max_in_flight: int = 1024
    seed: int = 0
    prompt_seed: str = ""

    def __post_init__(self) -> None:
        if bool(self.rate) == bool(self.concurrency):
            raise QsunError("give either --rate for an open loop or --concurrency for a closed one")
        if self.rate and not 0 < self.rate < math.inf:
            raise QsunError(f"rate {self.rate:g} is out of range; use requests/s above 0, or --concurrency to saturate")
        zipf_shares(self.models or ("any",), self.skew)
        for name, text in (("models", ",".join(self.models)), ("prompt-seed", self.prompt_seed)):
            check_text(text, name)
        for name, low in (("concurrency", 0), ("requests", 1), ("warm_up", 0), ("rounds", 1), ("max_in_flight", 1)):
            if getattr(self, name) < low:
                raise QsunError(f"{name} {getattr(self, name)} is out of range; use {low} or more")


@dataclass(frozen=True)
class Measured:
    """Records of each server, one list a round.

    Attributes:
        pieces: tokens of random prompts. prompt_seed: of their letters. Both None with prompts of a file.
    """

    rounds: Mapping[str, Sequence[Sequence[Record]]]
    models: tuple[str, ...]
    pieces: Pieces | None
    prompt_seed: str | None

    def all_records(self, server: str) -> list[Record]:
        """Return the records of all rounds, one after the other on one time axis."""
        found: list[Record] = []
        for records in self.rounds[server]:
            found += [_later(record, _end(found)) for record in records]
        return found


def _end(records: Sequence[Record]) -> float:
    return max((record.ended or record.arrival for record in records), default=0.0)


def _later(record: Record, seconds: float) -> Record:
    times = ("arrival", "sent", "first", "last", "ended")
    moved = {name: value + seconds for name in times if (value := getattr(record, name)) is not None}
    return replace(record, **moved)


def run_load(targets: Mapping[str, Target], settings: LoadSettings, progress: Progress, note: Note) -> Measured:
    """Load one server, or two in turns; the order changes every round.

    Both get the same requests in a round, except for the letters of random prompts: the two may share a cache.

    Args:
        targets: OURS and, to compare, THEIRS.
        note: receives what a reader of the result must know.
    Raises:
        QsunError: a server does not answer before the load begins.
    """
    return asyncio.run(_run(targets, settings, progress, note))


async def _run(targets: Mapping[str, Target], settings: LoadSettings, progress: Progress, note: Note) -> Measured:
    first = targets[OURS]
    models = settings.models or await served_models(first)
    pieces = None
    if not settings.rows:
        pieces = await probe_pieces(first, models[0])
        if pieces is None:
            note("the server reports no usage: a letter of a random prompt counts as a token")
            pieces = Pieces()
    prompts = PromptSource(first.endpoint, pieces or Pieces(), settings.rows)
    prompt_seed = settings.prompt_seed or secrets.token_hex(8)
    rounds: dict[str, list[list[Record]]] = {name: [] for name in targets}
    for number in range(settings.rounds):
        workload = Workload(models, settings.skew, settings.prompt, settings.output, settings.seed + number)
        for name in list(targets)[:: 1 if number % 2 == 0 else -1]:

            def labelled(label: str, done: int, total: int, name: str = name, number: int = number) -> None:
                where = f"{name}, round {number + 1}: " if settings.rounds * len(targets) > 1 else ""
                progress(where + label, done, total)

            letters = f"{prompt_seed} {number} {name}"
            rounds[name].append(await _one(targets[name], settings, workload, prompts, letters, labelled))
            _warn(name, rounds[name][-1], note)
    return Measured(rounds, models, pieces, None if settings.rows else prompt_seed)


async def _one(
    target: Target,
    settings: LoadSettings,
    workload: Workload,
    prompts: PromptSource,
    prompt_seed: str,
    progress: Progress,
) -> list[Record]:
    planned = plan_requests(
        workload, prompts, settings.rate or math.inf, settings.requests, settings.warm_up, prompt_seed
    )
    if settings.concurrency:
        return await closed_loop(target, planned, settings.concurrency, progress)
    return await open_loop(target, planned, settings.max_in_flight, progress)


def _warn(name: str, records: Sequence[Record], note: Note) -> None:
    late = sum((record.lag_ms or 0.0) > _LATE_MS for record in records)
    if late > len(records) / 100:
        note(
            f"{name}: {late} of {len(records)} requests were sent more than {_LATE_MS:g} ms late: this machine is busy"
        )


def load_result(measured: Measured, level: ServiceLevel, decode_workers: int) -> dict[str, Any]:
    """Summarize each server over all rounds and by round; with two, add the ratios of the first to the second."""
    result: dict[str, Any] = {"models": list(measured.models), "slo": level.described()}
    result["prompt_seed"] = measured.prompt_seed
    if measured.pieces is not None:
        result["tokens_of_a_random_prompt"] = {"fixed": measured.pieces.fixed, "each": measured.pieces.each}
    for name, rounds in measured.rounds.items():
        result[name] = load_summary(rounds, level, decode_workers)
        result[name]["rounds"] = [load_summary([records], level, decode_workers) for records in rounds]
    if THEIRS in measured.rounds:
        pairs = zip(result[OURS]["rounds"], result[THEIRS]["rounds"], strict=True)
        result["ratios_by_round"] = [ratios(ours, theirs) for ours, theirs in pairs]
        result["ratios"] = geometric_means(result["ratios_by_round"])
    return result
