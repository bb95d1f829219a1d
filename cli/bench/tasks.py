"""`qsun bench tasks`, `task-data` and `tuning`: accuracy and cost of SUN against full fine-tuning."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import check_device, use_device
from qsun.cli.terminal.options import names, numbers, whole_numbers
from qsun.errors import QsunError


def tasks(
    out: Path = typer.Option(..., "--out", "-o", help="Folder; a stopped study in it is continued."),
    base: str = typer.Option("demo", help="Full-precision base: directory, hub id or 'demo'."),
    task: list[str] = typer.Option(
        [],
        help="NAME=TRAIN,VALID,TEST[,SCORER], or the name of an embedded task; repeatable. SCORER: exact, json, "
        "expression or module:function. Default: the embedded tasks.",
    ),
    seeds: int = typer.Option(3, min=1, help="Number of seeds of data, order and calibration."),
    steps: int = typer.Option(1000, min=1, help="Budget of SUN and of the full fine-tune alike."),
    curve: str = typer.Option("125,250,500", help="Smaller budgets of the first seed, for accuracy by steps."),
    align_steps: int = typer.Option(250, min=0, help="Further steps against each quantized decode module; 0: none."),
    align_share: float = typer.Option(
        1.0, min=0.001, max=1.0, help="Peak rate of the alignment steps, as a share of the rate before."
    ),
    distill: bool = typer.Option(False, "--distill", help="Also take these steps on the SUN pair's distributions."),
    lora_ranks: str = typer.Option("", help="Ranks of adapters to tune as well, comma-separated, such as 4,16,64."),
    text: bool = typer.Option(True, help="Calibrate each decode module with the packaged text too."),
    batch_size: int = typer.Option(32, min=1, help="Examples a step."),
    lr: float | None = typer.Option(None, help="Peak rate of prefill modules. Default: 3e-3 for demo, else by width."),
    full_lr: float | None = typer.Option(
        None, help="Peak rate of full fine-tunes. Default: --lr; without it, by width."
    ),
    rates: str = typer.Option(
        "",
        help="Peak rates to try in place of --lr, --full-lr and a --lora-lr that is not given, such as 3e-4,1e-3. SUN, "
        "full fine-tunes and adapters of each rank take the best on each task's validation data.",
    ),
    rate_steps: int = typer.Option(0, min=0, help="Steps of a trial. Default: a quarter of --steps."),
    lora_lr: str = typer.Option(
        "", help="Peak rate of adapters, or one for each rank. Default: the best of --rates, without these by width."
    ),
    train: int = typer.Option(8192, min=1, help="Training examples of each embedded task."),
    valid: int = typer.Option(256, min=1, help="Examples of each validation."),
    test: int | None = typer.Option(None, min=1, help="Test examples. Default: 500 embedded ones, or all of a file."),
    bits: str = typer.Option("4,3,2", help="Bits of decode modules, comma-separated."),
    methods: str = typer.Option("rtn,awq,gptq,refined", help="Quantization methods, comma-separated."),
    group_size: int = typer.Option(32, help="Decode group size: -1, 32, 64, 128."),
    sym: bool = typer.Option(False, "--sym", help="Symmetric decode modules."),
    samples: int = typer.Option(128, min=1, help="Calibration sequences of each decode module."),
    polish: int = typer.Option(0, min=0, help="Steps of polish of each decode module, as in qsun quantize."),
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
    device: str = typer.Option("cpu", help="cpu, cuda."),
    processes: int = typer.Option(2, min=1, help="Modules to work on at a time; they share the CPU's cores."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print what is missing, piece by piece, and do nothing."),
    so_far: bool = typer.Option(False, "--so-far", help="Print the scores that a stopped study has, and do nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Measure the accuracy of full fine-tuning, SUN and QSUN on tasks: methods, bits, calibration, alignment.

    Writes study.md, scores.json, bits.png, curve.png, and matrix.yaml for qsun eval. With the defaults it takes an hour
    and a half on 2 cores; it can be stopped at any time, and a larger study in the same folder adds what is missing.

    Examples:

      qsun bench tasks -o out/study --seeds 1 --steps 400

      qsun bench tasks -o out/study --seeds 1 --steps 400 --so-far

      qsun bench tasks -o out/mine --base ./SmolLM2-135M --rates 3e-4,1e-3 \
        --task calls=train.jsonl,valid.jsonl,test.jsonl,json
    """
    study = _study(locals())
    from qsun.eval.study.matrix import write_matrix
    from qsun.eval.study.run import finished_answers, missing_work, run_study, scores_table, work_table

    screen.show_warnings()
    if dry_run:
        missing = missing_work(study, out)
        results.show([w.described() for w in missing], as_json, lambda _: work_table(missing))
        return
    if so_far:
        results.show(found := finished_answers(study, out), as_json, lambda _: scores_table(found))
        return
    try:
        with screen.progress(as_json) as progress:
            result = run_study(study, out, processes, progress)
    except KeyboardInterrupt:
        screen.interrupted("finished pieces are kept, the same command continues")
    report = _write_report(result, out)
    write_matrix(study, out)
    results.show(result, as_json, lambda _: report)


def _study(options: dict[str, Any]) -> Any:
    """Return the Study of the command's options; those of the same name and form are taken as they are."""
    check_device(options["device"])
    from qsun.config import DTYPES, check_one_of
    from qsun.eval.study.study import Study
    from qsun.eval.study.task import EMBEDDED, StudyTask

    check_one_of("--dtype", options["dtype"], DTYPES)
    lr, steps, own = options["lr"], options["steps"], options["task"]
    if options["rate_steps"] and not options["rates"]:
        raise QsunError(f"--rate-steps {options['rate_steps']} are steps of a trial; give the --rates to try")
    if options["rates"] and (lr is not None or options["full_lr"] is not None):
        raise QsunError("--rates are tried in place of --lr and --full-lr; give either")
    rate = lr if lr is not None else (3e-3 if options["base"] == "demo" else 0.0)
    tasks = tuple(map(StudyTask.parse, own)) or EMBEDDED
    parsed = {
        "tasks": tasks,
        "curve": tuple(sorted({c for c in whole_numbers("curve", options["curve"]) if c < steps})),
        "lora_ranks": tuple(whole_numbers("lora-ranks", options["lora_ranks"])),
        "lora_lr": tuple(numbers("lora-lr", options["lora_lr"])),
        "rates": tuple(numbers("rates", options["rates"])),
        "bits": tuple(whole_numbers("bits", options["bits"])),
        "methods": tuple(names(options["methods"])),
        "lr": rate,
        "full_lr": rate if options["full_lr"] is None else options["full_lr"],
        "test": 500 * all(t.embedded for t in tasks) if options["test"] is None else options["test"],
    }
    return Study(**{field.name: options[field.name] for field in fields(Study) if field.name in options} | parsed)


def _write_report(result: dict[str, Any], out: Path) -> str:
    """Write the scores of a study, its tables and its pictures; return the tables."""
    from qsun.eval.study.report import Scores, bits_figure, curve_figure, markdown
    from qsun.figure import save_figure

    scores = Scores(result)
    report = markdown(scores)
    results.save(out, "scores", result)
    (out / "study.md").write_text(report, encoding="utf-8")
    save_figure(bits_figure(scores), out / "bits.png")
    save_figure(curve_figure(scores), out / "curve.png")
    return report


def task_data(
    out: Path = typer.Option(..., "--out", "-o", help="Folder for {snips,django,svamp}-{train,valid,test}.jsonl."),
    snips: Path = typer.Option(..., help="A checkout of github.com/sonos/nlu-benchmark."),
    django: Path = typer.Option(..., help="A checkout of github.com/odashi/ase15-django-dataset."),
    svamp: Path | None = typer.Option(None, help="A checkout of github.com/arkilpatel/SVAMP. Default: without it."),
) -> None:
    """Turn public data sets into the tasks of docs/results/real: tool calls, lines of Python, word problems.

    Example:

      qsun bench task-data -o out/real-data --snips ./nlu-benchmark --django ./ase15-django-dataset
    """
    from qsun.eval.study.real_data import write_real_tasks

    for name, count in write_real_tasks(snips, django, out, svamp).items():
        typer.echo(f"{out / name}.jsonl: {count} examples")


def tuning(
    decode: str = typer.Argument("demo", help="Decode module: directory, hub id or 'demo'."),
    data: Path = typer.Option(..., help="Training data, as for qsun tune."),
    steps: int = typer.Option(30, min=1, help="Timed steps of each."),
    batch_size: int = typer.Option(32, min=1, help="Examples of a step."),
    threads: int = typer.Option(0, min=0, help="CPU threads. Default: as torch chooses."),
    device: str = typer.Option("", help="cpu or cuda. Default: a GPU if available."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Time a tuning step of a prefill module against one of a full fine-tune, in turns on the same batches.

    Example:

      qsun bench tuning demo --data out/tasks/math-train.jsonl
    """
    use_device(device, threads)
    from qsun.eval.speed.tuning_speed import compare_tuning

    found = compare_tuning(decode, data, steps, batch_size, device or None)
    line = (
        f"SUN {1000 * found['sun']:.1f} ms, full fine-tune {1000 * found['full']:.1f} ms a step: {found['ratio']:.3f}"
    )
    results.show(found, as_json, lambda _: line)
