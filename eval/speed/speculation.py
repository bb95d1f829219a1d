"""What drafting tokens from a row's own text saves in the engine's decode steps, on real prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from qsun.data.examples import TokenExample
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.engine.state import EngineWatch
from qsun.eval.output.table import Table
from qsun.progress import Progress
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.prefill_module import PrefillModule


@dataclass
class _Run(EngineWatch):
    """The decode steps of one group of prompts."""

    steps: int = 0
    seconds: float = 0.0
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    def step(self, rows: int, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds


def compare_speculation(
    decode: DecodeModule,
    prefill: PrefillModule,
    examples: Sequence[TokenExample],
    batch: int,
    drafts: Sequence[int],
    max_new_tokens: int,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Answer groups of `batch` prompts with each length of drafts, 0 among them, in turns group by group.

    Returns:
        For each length: tokens per step and second of decoding, the share of drafts that held, and `speedup`, the
        median over the groups of the seconds without drafts over those with them. `same`: answers were those without.
    """
    lengths = [0, *(length for length in drafts if length)]
    runs: dict[int, list[_Run]] = {length: [] for length in lengths}
    groups = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    for number, group in enumerate(groups):
        order = lengths if number % 2 else lengths[::-1]
        for length in order:
            runs[length].append(_answer(decode, prefill, group, length, max_new_tokens))
        progress(f"batch {batch}", number + 1, len(groups))
    return [_summary(batch, length, runs[length], runs[0]) for length in lengths]


def _answer(
    decode: DecodeModule, prefill: PrefillModule, group: Sequence[TokenExample], length: int, most: int
) -> _Run:
    run = _Run()
    config = EngineConfig(max_batch=len(group), prefix_bytes=0, prefill_tokens=1 << 62, speculate=length, static=False)
    engine = Engine(decode, config, run)
    engine.add_module("one", prefill)
    sampling = Sampling(max_new_tokens=most, detokenize=False)
    engine.submit(*(Request(str(i), "one", example.prompt, sampling) for i, example in enumerate(group)))
    answers: dict[str, tuple[int, ...]] = {str(i): () for i in range(len(group))}
    while not engine.idle:
        for update in engine.step():
            answers[update.request] += update.tokens
    run.tokens, run.drafted, run.accepted = list(answers.values()), engine.state.drafted, engine.state.accepted
    return run


def _summary(batch: int, length: int, runs: list[_Run], plain: list[_Run]) -> dict[str, Any]:
    tokens = sum(len(answer) for run in runs for answer in run.tokens)
    drafted, seconds = sum(run.drafted for run in runs), sum(run.seconds for run in runs)
    same = sum(a == b for run, other in zip(runs, plain, strict=True) for a, b in zip(run.tokens, other.tokens))  # noqa: B905
    return {
        "batch": batch,
        "drafts": length,
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / sum(run.steps for run in runs) / batch,
        "accepted": sum(run.accepted for run in runs) / drafted if drafted else None,
        "speedup": median(other.seconds / run.seconds for run, other in zip(runs, plain, strict=True)),
        "same": same,
        "answers": sum(len(run.tokens) for run in runs),
    }


COLUMNS = {
    "batch": "{batch}",
    "drafts": "{drafts}",
    "tokens a row and step": "{tokens_per_step:.2f}",
    "drafts that held": "{accepted:.0%}",
    "tokens/s": "{tokens_per_second:.0f}",
    "speed-up": "{speedup:.2f}",
    "same answers": "{same}/{answers}",
}


def report_text(result: dict[str, Any]) -> str:
    return Table.of(result["rows"], COLUMNS).text()
