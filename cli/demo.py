"""`qsun demo`: the whole story on the embedded base."""

import json
import time
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen
from qsun.errors import QsunError


def demo(
    out: Path = typer.Option(Path("out/story"), "--out", "-o", help="Folder for modules, data, table and picture."),
    quick: bool = typer.Option(
        False, "--quick", help="200 steps instead of 700, in smaller batches: under 3 minutes, lower accuracy."
    ),
    seed: int = typer.Option(0, help="Of data and tuning."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Quantize the embedded base, tune it to three tasks, and serve all three from one decode module.

    Everything printed is measured in this run, on 2 CPU cores in at most 10 minutes.

    Examples:

      qsun demo

      qsun demo --quick -o out/quick
    """
    from qsun.eval.study.walkthrough import FULL, QUICK, plot_story, tell_story

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QsunError(f"output directory {out} exists; choose another, or delete it first")
    screen.show_warnings()
    started = time.perf_counter()
    with screen.progress(as_json) as progress:
        result = tell_story(out, QUICK if quick else FULL, seed, progress)
    result["seconds"] = round(time.perf_counter() - started, 1)
    (out / "story.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_story(result, out / "story.png")
    typer.echo(json.dumps(result) if as_json else "\n".join(_lines(result, out)))


def _lines(result: dict[str, Any], out: Path) -> list[str]:
    table = result["exact_match"]
    variants = list(next(iter(table.values())))
    lines = [
        f"exact match on {result['test_examples']} held-out examples a task, +- standard error:",
        f"{'':<8}" + "".join(f"{variant:>18}" for variant in variants),
    ]
    for task, cells in table.items():
        row = (f"{100 * cells[v]['rate']:.1f} +- {100 * cells[v]['stderr']:.1f}" for v in variants)
        lines.append(f"{task:<8}" + "".join(f"{cell:>18}" for cell in row))
    means = (sum(cells[v]["rate"] for cells in table.values()) / len(table) for v in variants)
    lines.append(f"{'average':<8}" + "".join(f"{100 * mean:>18.1f}" for mean in means))
    mixed = result["mixed_batch"]
    lines.append(
        f"one decode batch of {mixed['rows']} prompts of {len(table)} prefill modules: {mixed['equal']} answers are "
        f"those of the prompt alone ({result['bits_per_weight']:.2f} bits a decode weight)"
    )
    lines += [f"  {row['task']:<5} {row['prompt']!r} -> {row['answer']!r}" for row in mixed["shown"]]
    lines.append(f"{result['seconds']:.0f} s; table and picture: {out / 'story.json'}, {out / 'story.png'}")
    return lines
