"""`qsun bench tasks` and `qsun bench tuning`: accuracy and cost of SUN against full fine-tuning."""

import json
from pathlib import Path

import typer

from qsun.cli.bench.speed import whole_numbers
from qsun.cli.terminal import screen
from qsun.cli.terminal.device import check_device


def tasks(
    out: Path = typer.Option(..., "--out", "-o", help="Folder; a study in it goes on where it stopped."),
    seeds: int = typer.Option(3, min=1, help="Of data, order and calibration."),
    steps: int = typer.Option(1000, min=1, help="Budget of SUN and of the full fine-tune alike."),
    curve: str = typer.Option("125,250,500", help="Smaller budgets of the first seed, for accuracy against steps."),
    align_steps: int = typer.Option(250, min=1, help="Further steps against each quantized decode module."),
    lr: float = typer.Option(3e-3, help="Peak rate of prefill modules."),
    full_lr: float = typer.Option(3e-3, help="Peak rate of full fine-tunes."),
    test: int = typer.Option(500, min=1, help="Held-out examples of each task and seed."),
    processes: int = typer.Option(2, min=1, help="Of one thread each."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Accuracy of full fine-tuning, SUN and QSUN on the embedded tasks: passes, bits, calibration, alignment.

    Leaves study.md, scores.json, bits.png, curve.png, and matrix.yaml for qsun eval. An hour and a half on 2 cores with
    the defaults.

    Example:

      qsun bench tasks -o out/study --seeds 1 --steps 400
    """
    from qsun.eval.study.matrix import write_matrix
    from qsun.eval.study.report import Scores, markdown, plot_bits, plot_curve
    from qsun.eval.study.study import Study, run_study

    screen.show_warnings()
    study = Study(
        seeds=seeds,
        steps=steps,
        curve=tuple(sorted({c for c in whole_numbers("curve", curve) if c < steps})) if curve else (),
        align_steps=align_steps,
        lr=lr,
        full_lr=full_lr,
        test=test,
    )
    with screen.progress(as_json) as progress:
        result = run_study(study, out, processes, progress)
    (out / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
    scores = Scores(result)
    (out / "study.md").write_text(markdown(scores))
    write_matrix(study, out)
    plot_bits(scores, out / "bits.png")
    plot_curve(scores, out / "curve.png")
    typer.echo(json.dumps(result) if as_json else markdown(scores))


def tuning(
    decode: str = typer.Argument("demo", help="Decode module: directory, hub id or 'demo'."),
    data: Path = typer.Option(..., help="Training data, as for qsun tune."),
    steps: int = typer.Option(30, min=1, help="Timed steps of each."),
    batch_size: int = typer.Option(32, min=1, help="Examples of a step."),
    threads: int = typer.Option(0, help="CPU threads. Default: as torch chooses."),
    device: str = typer.Option("", help="cpu or cuda. Default: a GPU where there is one."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Seconds of a tuning step of a prefill module, over those of a full fine-tune: the same batches, in turns.

    Example:

      qsun bench tuning demo --data out/tasks/math-train.jsonl
    """
    check_device(device or None)
    import torch

    from qsun.eval.speed.tuning_speed import compare_tuning

    if threads:
        torch.set_num_threads(threads)
    found = compare_tuning(decode, data, steps, batch_size, device or None)
    line = (
        f"SUN {1000 * found['sun']:.1f} ms, full fine-tune {1000 * found['full']:.1f} ms a step: {found['ratio']:.3f}"
    )
    typer.echo(json.dumps(found) if as_json else line)
