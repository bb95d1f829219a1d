"""`qsun demo`: SUN and QSUN from end to end on the embedded base."""

import time
from pathlib import Path

import typer

from qsun.cli.terminal import results, screen


def demo(
    out: Path = typer.Option(Path("out/demo"), "--out", "-o", help="Folder for modules, data, table and picture."),
    quick: bool = typer.Option(
        False, "--quick", help="200 steps instead of 700, in smaller batches: under 3 minutes, lower accuracy."
    ),
    seed: int = typer.Option(0, help="Random seed of data and tuning."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Quantize the embedded base, tune it to three tasks, and serve all three from one decode module.

    Everything printed is measured in this run, on 2 CPU cores in at most 10 minutes.

    Examples:

      qsun demo

      qsun demo --quick -o out/quick
    """
    from qsun.eval.study.walkthrough import FULL, QUICK, report_text, run_walkthrough, walkthrough_figure
    from qsun.model.output_dir import check_free

    check_free(out, resume=False)
    screen.show_warnings()
    started = time.perf_counter()
    with screen.progress(as_json) as progress:
        result = run_walkthrough(out, QUICK if quick else FULL, seed, progress)
    result["seconds"] = round(time.perf_counter() - started, 1)
    results.save(out, "demo", result, lambda: walkthrough_figure(result))
    results.show(result, as_json, report_text)
    if not as_json:
        typer.echo(f"{result['seconds']:.0f} s; table and picture: {out / 'demo.json'}, {out / 'demo.png'}")
