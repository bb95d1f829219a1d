"""`qsun eval`: accuracy, divergence and speed of SUN and QSUN against full fine-tuning, in one report."""

import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import check_device
from qsun.cli.terminal.options import names
from qsun.config import DTYPES, check_one_of
from qsun.errors import QsunError

EXAMPLES = """Compare base, full fine-tune, SUN and QSUN on lm-eval tasks, with error bars, in one report.

Writes report.html (a single file to share), report.md, report.json and pictures in the folder.

Examples:

  qsun eval --decode out/int4 --prefill out/math --full-ft out/math-full --tasks qsun_math -o out/report

  qsun eval --decode out/int4 --prefill out/math --tasks gsm8k_local --task-data data/ --limit 200 -o out/gsm8k

  qsun eval --decode out/int4 --text wiki.txt --responses valid.jsonl -o out/divergence

  qsun eval --matrix study.yaml -o out/all --resume"""


def evaluate(
    out: Path = typer.Option(..., "--out", "-o", help="Folder for the report."),
    decode: str = typer.Option("", help="Decode module: directory, hub id or 'demo'."),
    prefill: str = typer.Option("", help="Prefill module to pair with it."),
    full_ft: str = typer.Option("", "--full-ft", help="Conventional fine-tune to compare with."),
    base: str = typer.Option("", help="Full-precision base. Default: what the decode module names."),
    matrix: Path | None = typer.Option(None, help="YAML file of variants instead of the options above."),
    tasks: str = typer.Option("", help="lm-eval tasks, comma-separated; qsun_math, qsun_code, qsun_tool are embedded."),
    task_dir: str = typer.Option("", help="Folder of more lm-eval task files."),
    task_data: str = typer.Option("", help="Folder of local copies of public data, for gsm8k_local and others."),
    limit: int = typer.Option(0, min=0, help="Examples of each task; 0: all."),
    num_fewshot: int | None = typer.Option(None, help="Examples in the prompt. Default: the task's own."),
    chat_template: bool = typer.Option(False, "--chat-template", help="Render prompts as chats."),
    allow_code: bool = typer.Option(False, "--allow-code-execution", help="Run what the model writes, in a sandbox."),
    text: Path | None = typer.Option(None, help="Running text: perplexity and divergence of the decode modules."),
    windows: str = typer.Option("64x256", help="Windows of the text, and tokens in each."),
    responses: Path | None = typer.Option(
        None, help=".jsonl of prompts and responses: divergence at decode positions."
    ),
    speed: str = typer.Option(
        "",
        help="Add decode speed: of the given 'modules', of a shape such as llama-3.2-1b, or from a speed.json.",
    ),
    batch_size: str = typer.Option("auto", help="Batch size of lm-eval's requests, or auto."),
    dtype: str = typer.Option(
        "auto", help="auto, float32, bfloat16 or float16; auto: as stored on a GPU, float32 on a CPU."
    ),
    device: str = typer.Option("", help="cpu, cuda. Default: a GPU if available."),
    seed: int = typer.Option(0, help="Random seed of few-shot examples and sampling."),
    resume: bool = typer.Option(False, "--resume", help="Continue a stopped run with the same settings."),
    as_json: bool = typer.Option(False, "--json", help="Print report.json on stdout."),
) -> None:
    from qsun.eval.harness.run import HarnessSettings
    from qsun.eval.report.evaluation import Evaluation, check_speed, measured_speed
    from qsun.eval.report.evaluation import evaluate as run
    from qsun.eval.report.pages import report_text
    from qsun.eval.report.variants import from_file, from_options

    screen.show_warnings()
    check_device(device or None)
    check_one_of("--dtype", dtype, DTYPES)
    if matrix and (prefill or full_ft or base):
        raise QsunError("--matrix names all modules; omit --prefill, --full-ft and --base")
    wanted = names(tasks)
    if bool(matrix) == bool(decode):
        raise QsunError("give either --decode (with --prefill and --full-ft) or --matrix")
    chosen = from_file(matrix, wanted) if matrix else from_options(decode, prefill, full_ft, wanted, base or None)
    if not (chosen.tasks or speed or text or responses or any(entry.responses for entry in chosen.entries)):
        raise QsunError("nothing to evaluate; give --tasks, --text, --responses or --speed")
    harness = HarnessSettings(limit, batch_size, num_fewshot, chat_template, task_dir, task_data, allow_code, seed)
    job = Evaluation(chosen, harness, text, _windows(windows), responses, dtype, device)
    if speed:
        check_speed(speed, job)
    with screen.progress(as_json) as progress:
        parts = run(job, out, resume, progress)
    report = _write(job, parts, None, out, seed)
    if speed:
        report = _write(job, parts, measured_speed(speed, job, screen.note), out, seed)
    results.show(report, as_json, lambda report: f"{report_text(report)}\nreport: {out / 'report.html'}")


def _windows(value: str) -> tuple[int, int]:
    count, _, length = value.partition("x")
    if not (count.isdecimal() and length.isdecimal() and int(count) and int(length) > 1):
        raise QsunError(f"--windows {value!r} is not of the form 64x256")
    return int(count), int(length)


def _write(job: Any, parts: list[dict[str, Any]], speed: Any, out: Path, seed: int) -> dict[str, Any]:
    from qsun.eval.report.pages import markdown, page
    from qsun.eval.report.plots import draw_plots
    from qsun.eval.report.summary import provenance, summarize
    from qsun.model.manifest import write_json

    command = shlex.join(["qsun", *sys.argv[1:]])
    report = summarize(job.matrix, parts) | {
        "provenance": provenance(command, seed, job.place()),
        "settings": job.settings(),
    }
    report |= {"speed": speed} if speed else {}
    pictures = draw_plots(report)
    for name, png in pictures.items():
        (out / f"{name}.png").write_bytes(png)
    (out / "report.md").write_text(markdown(report, list(pictures)), encoding="utf-8")
    (out / "report.html").write_text(page(report, pictures), encoding="utf-8")
    write_json(out / "report.json", report)
    return report
