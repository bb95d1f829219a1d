"""`qsun demo`: SUN and QSUN from end to end on the embedded base, everything measured in the run.

Tune a prefill module for each task, quantize the base behind them; measure exact match of base, full fine-tune, SUN and
QSUN on held-out examples; then serve all tasks from one decode batch.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

from qsun.config import QuantConfig
from qsun.demo.tasks import TASKS, TaskExample, examples, write_jsonl
from qsun.engine.generation import generate
from qsun.eval.harness.exact_match import Score, exact_match
from qsun.eval.output.table import Table
from qsun.figure import new_figure
from qsun.progress import Progress
from qsun.quantization.run import quantize
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import PrefillModule, load_prefill
from qsun.tuning.config import TuneConfig
from qsun.tuning.tuner import tune

VARIANTS = ("base", "full fine-tune", "SUN", "QSUN int4")


@dataclass(frozen=True)
class Effort:
    """How long to tune and how much to test. The full fine-tune gets the same steps and data as SUN."""

    steps: int
    batch_size: int
    train: int
    test: int


FULL = Effort(steps=700, batch_size=32, train=8192, test=500)
QUICK = Effort(steps=200, batch_size=24, train=4800, test=200)


def run_walkthrough(out: Path, effort: Effort, seed: int = 0, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Run all steps under `out`, which must be new or empty and keeps the modules, data and reports.

    Returns:
        {"exact_match": {task: {variant: {"rate", "stderr"}}}, "mixed_batch", "bits_per_weight", "test_examples", ...}
    """
    total = 2 + 6 * len(TASKS)
    done = 0

    def step(label: str) -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    progress("tuning and quantizing", 0, total)
    report = _make_modules(out, effort, seed, step)
    base = load_decode("demo", "cpu", "float32"), load_prefill("demo", dtype="float32", device="cpu")
    int4 = load_decode(out / "decode-int4", "cpu", "float32")
    scores: dict[str, dict[str, Score]] = {}
    modules: dict[str, PrefillModule] = {}
    for task in TASKS:
        test = examples(task, "test", effort.test, seed)
        modules[task], full = (_load(out / how / task) for how in ("prefill", "full"))
        pairs = (
            (base[1], base[0]),
            (full, DecodeModule(full.model, full.directory, full.manifest)),
            (modules[task], base[0]),
            (modules[task], int4),
        )
        scores[task] = {}
        for variant, (prefill, decode) in zip(VARIANTS, pairs, strict=True):
            scores[task][variant] = exact_match(task, test, prefill, decode)
            step(f"{task}: {variant} answered {scores[task][variant].rate:.1%} correctly")
    mixed = mixed_batch(modules, int4, seed)
    step("one decode batch served all tasks")
    return {
        "seed": seed,
        "steps": effort.steps,
        "test_examples": effort.test,
        "exact_match": {
            task: {variant: {"rate": s.rate, "stderr": s.stderr} for variant, s in by_variant.items()}
            for task, by_variant in scores.items()
        },
        "bits_per_weight": report["bits_per_weight"],
        "mixed_batch": mixed,
    }


def _make_modules(out: Path, effort: Effort, seed: int, step: Callable[[str], None]) -> dict[str, Any]:
    """Make data, tuned modules and the decode module; two modules are tuned at a time, because each uses one core.

    Returns:
        The report of the quantization.
    """
    for folder in ("data", "prefill", "full"):
        (out / folder).mkdir(parents=True)
    for task in TASKS:
        for split, count in (("train", effort.train), ("valid", 200)):
            write_jsonl(out / "data" / f"{task}.{split}.jsonl", examples(task, split, count, seed))
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        jobs = {
            pool.submit(_tune, out, task, how, effort, seed): f"{task}: {label}"
            for task in TASKS
            for how, label in (("prefill", "prefill module tuned"), ("full", "full fine-tune tuned"))
        }
        for job in as_completed(jobs):
            job.result()
            step(jobs[job])
    report = quantize(
        "demo",
        out / "decode-int4",
        QuantConfig(seed=seed),
        [out / "data" / f"{task}.train.jsonl" for task in TASKS],
        device="cpu",
        calibration_prefill=[out / "prefill" / task for task in TASKS],
    )
    step("decode module quantized to 4 bits, calibrated behind the prefill modules")
    return report


def _tune(out: Path, task: str, how: str, effort: Effort, seed: int) -> None:
    torch.set_num_threads(1)
    config = TuneConfig(
        steps=effort.steps, batch_size=effort.batch_size, seed=seed, baseline="full" if how == "full" else "none"
    )
    data, valid = (out / "data" / f"{task}.{split}.jsonl" for split in ("train", "valid"))
    tune("demo", out / how / task, data, config, eval_data=valid, device="cpu")


def _load(directory: Path) -> PrefillModule:
    return load_prefill(directory, dtype="float32", device="cpu")


def mixed_batch(modules: dict[str, PrefillModule], decode: DecodeModule, seed: int, each: int = 8) -> dict[str, Any]:
    """Decode prompts of every task in one batch, and the same prompts one at a time.

    Returns:
        {"rows", "equal": rows with the same answer as alone, "shown": one example a task with prompt and answer}.
    """
    drawn = [(task, example) for task in modules for example in examples(task, "test", each, seed + 1)]
    Random(seed).shuffle(drawn)
    prefills, prompts = [modules[task] for task, _ in drawn], [example.prompt for _, example in drawn]
    together = generate(prefills, decode, prompts, max_new_tokens=64, batch_size=len(prompts))
    alone = [generate(p, decode, [text], max_new_tokens=64)[0] for p, text in zip(prefills, prompts, strict=True)]
    shown: dict[str, tuple[TaskExample, str]] = {}
    for (task, example), answer in zip(drawn, together, strict=True):
        shown.setdefault(task, (example, answer))
    return {
        "rows": len(drawn),
        "equal": sum(a == b for a, b in zip(together, alone, strict=True)),
        "shown": [
            {"task": task, "prompt": shown[task][0].prompt, "answer": shown[task][1], "right": shown[task][0].response}
            for task in modules
        ],
    }


def walkthrough_figure(result: Mapping[str, Any]) -> Any:
    """Draw the exact match of every variant with standard errors, a group of bars a task."""
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    width = 0.8 / len(VARIANTS)
    tasks = list(result["exact_match"])
    for number, (variant, color) in enumerate(zip(VARIANTS, ("0.75", "0.35", "tab:orange", "tab:blue"), strict=True)):
        cells = [result["exact_match"][task][variant] for task in tasks]
        places = [index + (number - (len(VARIANTS) - 1) / 2) * width for index in range(len(tasks))]
        rates, errors = [100 * cell["rate"] for cell in cells], [100 * cell["stderr"] for cell in cells]
        bars = axes.bar(places, rates, width * 0.92, yerr=errors, color=color, label=variant, capsize=2)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 112)
    axes.set_ylabel(f"exact match, % of {result['test_examples']} held-out examples")
    axes.set_title(
        f"One shared decode module, {len(tasks)} tasks ({result['steps']} tuning steps, seed {result['seed']})"
    )
    axes.legend(ncols=len(VARIANTS), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    return figure


def report_text(result: Mapping[str, Any]) -> str:
    """Return lines for a terminal."""
    match, mixed = result["exact_match"], result["mixed_batch"]
    rows = [
        [task, *(f"{100 * cells[v]['rate']:.1f} ± {100 * cells[v]['stderr']:.1f}" for v in VARIANTS)]
        for task, cells in match.items()
    ]
    rows.append(["average", *(f"{100 * fmean(cells[v]['rate'] for cells in match.values()):.1f}" for v in VARIANTS)])
    lines = [
        f"exact match on {result['test_examples']} held-out examples a task, ± standard error:",
        Table(["", *VARIANTS], rows).text(),
        f"one decode batch of {mixed['rows']} prompts of {len(match)} prefill modules: {mixed['equal']} answers equal "
        f"those of the prompt alone ({result['bits_per_weight']:.2f} bits a decode weight)",
    ]
    return "\n".join(
        [*lines, *(f"  {row['task']:<5} {row['prompt']!r} -> {row['answer']!r}" for row in mixed["shown"])]
    )
