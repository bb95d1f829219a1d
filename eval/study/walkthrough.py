"""`qsun demo`: SUN and QSUN from end to end on the embedded base, everything measured in the run.

A small study (run.py): exact match of base, full fine-tune, SUN and QSUN on held-out examples. Then one decode batch
serves all tasks.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from qsun.config import QuantConfig
from qsun.demo.tasks import TASKS, TaskExample, examples
from qsun.engine.generation import generate
from qsun.eval.harness.exact_match import Score
from qsun.eval.output.table import Table
from qsun.eval.study.run import run_study
from qsun.eval.study.study import Study
from qsun.eval.study.task import StudyTask
from qsun.figure import new_figure
from qsun.model.checkpoint import read_json
from qsun.progress import Progress
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import PrefillModule, load_prefill

_METHOD = QuantConfig().method
VARIANTS = {"base": "base", "full fine-tune": "full", "SUN": "sun", "QSUN int4": f"int4 {_METHOD} decode"}
FULL = Study(
    tasks=tuple(map(StudyTask, TASKS)),
    seeds=1,
    steps=700,
    curve=(),
    align_steps=0,
    text=False,
    lr=0.0,
    full_lr=0.0,
    bits=(4,),
    methods=(_METHOD,),
    group_size=QuantConfig().group_size,
    sym=QuantConfig().sym,
)
QUICK = replace(FULL, steps=200, batch_size=24, train=4800, test=200)


def run_walkthrough(out: Path, study: Study, seed: int = 0, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Run all steps under `out`, which must be new or empty and keeps the modules, data and reports.

    Returns:
        {"exact_match": {task: {variant: {"rate", "stderr"}}}, "mixed_batch", "bits_per_weight", "test_examples", ...}
    """
    study = replace(study, first_seed=seed)
    right = run_study(study, out, progress=progress)["right"][str(seed)]
    decoder = study.decoder(out, seed, _METHOD, 4)
    int4 = load_decode(decoder, "cpu", "float32")
    modules = {task: load_prefill(study.module(out, seed, task, "sun"), int4, "float32") for task in TASKS}
    return {
        "seed": seed,
        "steps": study.steps,
        "test_examples": study.test,
        "exact_match": {
            task: {label: _cell(right[task][variant]) for label, variant in VARIANTS.items()} for task in TASKS
        },
        "bits_per_weight": read_json(decoder / "report.json")["bits_per_weight"],
        "mixed_batch": mixed_batch(modules, int4, seed),
    }


def _cell(digits: str) -> dict[str, float]:
    score = Score(tuple(digit == "1" for digit in digits))
    return {"rate": score.rate, "stderr": score.stderr}


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
