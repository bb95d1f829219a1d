"""The modules that a study tunes, in the order in which they need each other."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from qsun.errors import QsunError
from qsun.eval.study.study import Study
from qsun.model.manifest import write_json
from qsun.model.output_dir import partial_path
from qsun.tuning.config import TuneConfig


@dataclass(frozen=True)
class Tuned:
    """A module that is tuned, for one task and seed.

    Attributes:
        name: its folder.
        steps: optimizer steps.
        bits: of the quantized decode module that it is tuned against; 0: the full-precision one.
        full: a conventional fine-tune instead of a prefill module.
        init, teacher: names of the modules that it starts from and learns from.
        lora_rank: of the adapter that is tuned; 0: all weights.
        weights: what an adapter is tuned on, as in TuneConfig.prefill_weights.
        rate: the peak rate that it tries; 0: it has the study's.
    """

    name: str
    steps: int
    bits: int = 0
    full: bool = False
    init: str = ""
    teacher: str = ""
    lora_rank: int = 0
    weights: Literal["base", "decode"] = "base"
    rate: float = 0.0

    @property
    def kind(self) -> str:
        """What it is tuned as, sun, full, lora16 or full-lora16: the modules of a task that share a rate."""
        if self.lora_rank:
            return f"full-lora{self.lora_rank}" if self.full else f"lora{self.lora_rank}"
        return "full" if self.full else "sun"

    def config(self, study: Study, seed: int, chosen: float = 0.0) -> TuneConfig:
        """Return the settings of tuning it. chosen: the best of the rates tried, if any were."""
        rate = self.rate or chosen
        if not rate:
            of_all_weights = study.full_lr if self.full else study.lr
            rate = study.lora_rates[self.lora_rank] if self.lora_rank else of_all_weights
        if self.init:
            rate *= study.align_share
        values = {"steps": self.steps, "batch_size": study.batch_size, "lr": rate, "seed": seed, "dtype": study.dtype}
        rank = 0 if self.init else self.lora_rank  # an adapter to start from has its own
        values |= {"lora_rank": rank, "prefill_weights": self.weights, "valid_examples": study.valid}
        return TuneConfig.from_dict(values | {"baseline": "full" if self.full else "none"})


def trials(study: Study, hard: bool) -> Iterator[Tuned]:
    """SUN, the full fine-tune, and adapters that have no rate of their own, with each rate that is tried."""
    steps = study.rate_steps or max(1, study.steps // 4)
    for rank in (0, *(() if hard or study.lora_lr else study.lora_ranks)):
        for rate, full in product(study.rates, (False, True)):
            module = Tuned("", steps, full=full, lora_rank=rank, rate=rate)
            yield replace(module, name=f"{module.kind}-at-{rate:g}")


def chosen_rate(study: Study, out: Path, task: str, kind: str) -> float:
    """Return the rate with the least validation loss, the first of equals; 0 if none were tried."""

    def loss(rate: float) -> float:
        folder = study.module(out, study.first_seed, task, f"{kind}-at-{rate:g}")
        found = json.loads((folder / "report.json").read_text())["best_valid_loss"]
        return math.inf if found is None else float(found)

    best = min(study.rates, key=loss, default=0.0)
    if best and loss(best) == math.inf:
        raise QsunError(
            f"{task}, {kind}: the loss is not finite at any of the rates tried; choose another folder and lower --rates"
        )
    return best


def note_diverged(trial: Path) -> None:
    """Leave in place of a module that its rate was too high; `qsun tune` left what it had begun."""
    partial = partial_path(trial)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_json(partial / "report.json", {"best_valid_loss": None})
    partial.rename(trial)  # whole or not at all: a folder there counts as done


def before_quantizing(study: Study, seed: int, hard: bool) -> Iterator[Tuned]:
    """SUN and the full fine-tune with every budget, and adapters of both; a hard task has none."""
    budgets = {study.steps, *(study.curve if seed == study.first_seed and not hard else ())}
    for steps in sorted(budgets, reverse=True):
        suffix = "" if steps == study.steps else f"-{steps}"
        yield Tuned(f"sun{suffix}", steps)
        yield Tuned(f"full{suffix}", steps, full=True)
    for rank in () if hard else study.lora_ranks:
        yield Tuned(f"lora{rank}", study.steps, lora_rank=rank)
        yield Tuned(f"full-lora{rank}", study.steps, full=True, lora_rank=rank)


def after_quantizing(study: Study) -> Iterator[Tuned]:
    """Prefill modules tuned further against each quantized decode module, and adapters on its own weights.

    As a control, `longer` has as many steps more against the full-precision decode module.
    """
    further = study.align_steps
    if further:
        yield Tuned("longer", further, init="sun")
    for bits in study.bits:
        if further:
            yield Tuned(f"aligned-int{bits}", further, bits, init="sun")
        if further and study.distill:
            yield Tuned(f"distilled-int{bits}", further, bits, init="sun", teacher="sun")
        for rank in study.lora_ranks:
            yield Tuned(f"lora{rank}-on-int{bits}", study.steps, bits, lora_rank=rank, weights="decode")


def after_adapters(study: Study) -> Iterator[Tuned]:
    """Adapters that learn further, from the distributions of the full module with the full-precision decode module."""
    if not (study.align_steps and study.distill):
        return
    for rank in study.lora_ranks:
        yield Tuned(f"lora{rank}-distilled", study.align_steps, init=f"lora{rank}", teacher="sun", lora_rank=rank)
        for bits in study.bits:
            name = f"lora{rank}-on-int{bits}"
            yield Tuned(
                f"{name}-distilled", study.align_steps, bits, init=name, teacher="sun", lora_rank=rank, weights="decode"
            )
