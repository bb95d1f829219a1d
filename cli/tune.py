"""`qsun tune`: one command from a decode module and examples to a prefill module."""

import json
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import screen
from qsun.cli.terminal.device import check_device
from qsun.cli.terminal.options import CONFIG, DEVICE, DRY_RUN, RESUME, settings_and_inputs
from qsun.errors import QsunError
from qsun.tuning.config import TuneConfig

_EXAMPLES = """Tune a prefill module for a task against the frozen decode module that all tasks share.

Examples:

  qsun tune demo -o tuned/math --data math.jsonl

  qsun tune ./Llama-3.1-8B-int4 -o tuned/code --data code.jsonl --lora-rank 32 --grad-checkpoint

  qsun tune ./Llama-3.1-8B-int4 -o tuned/tools --data tools.jsonl --lora-rank 16 --prefill-weights decode

  qsun tune ./Llama-3.1-8B-int2 -o tuned/math-int2 --data math.jsonl --init tuned/math --steps 100

  qsun tune ./Llama-3.1-8B-int4 -o tuned/math-distilled --data prompts.jsonl --lora-rank 16 --teacher full/math

  qsun tune demo -o full/math --data math.jsonl --baseline full

  accelerate launch --num_processes 8 -m qsun.cli.main tune ./Llama-3.1-8B -o out/ --data chat.jsonl

  torchrun --nproc-per-node 8 -m qsun.cli.main tune ./Llama-3.1-70B-int4 -o out/ --data chat.jsonl --shard

The output directory appears complete or not at all; --resume continues an interrupted run.
"""
_INPUTS = {"data": list, "eval_data": list, "base": str, "init": str, "teacher": str, "device": str}


def tune(
    decode: str = typer.Argument(..., help="Decode module, quantized or not: directory, hub id, or 'demo'."),
    out: Path = typer.Option(..., "--out", "-o", help="Directory to create."),
    data: list[str] | None = typer.Option(
        None, help="Prompt/response or chat rows: file or data set; may be repeated."
    ),
    base: str | None = typer.Option(None, help="Full-precision base. Default: what the decode module names."),
    init: str | None = typer.Option(
        None, help="Prefill module to start from, to re-tune it against this decode module."
    ),
    teacher: str | None = typer.Option(
        None, help="Learn the next-token distributions of a prefill module (with its decode module) or a whole model."
    ),
    teacher_weight: float | None = typer.Option(
        None, help="Share of the teacher's KL in the loss; the rest is cross-entropy. Default: 1."
    ),
    teacher_tokens: int | None = typer.Option(
        None, help="Longest answer of the teacher to a prompt without a response. Default: 256."
    ),
    eval_data: list[str] | None = typer.Option(None, help="Validation data. Default: part of --data is held out."),
    valid_examples: int | None = typer.Option(None, help="Examples per validation, 0 for all. Default: 256."),
    baseline: str | None = typer.Option(None, help="'full': a conventional fine-tune instead, to compare with."),
    lora_rank: int | None = typer.Option(None, help="Tune a LoRA adapter of this rank. Default: tune all weights."),
    lora_alpha: float | None = typer.Option(None, help="Scale of the adapter times its rank. Default: twice the rank."),
    lora_rslora: bool | None = typer.Option(
        None, "--lora-rslora/--no-lora-rslora", help="Divide alpha by the root of the rank. Alpha is then 8 by default."
    ),
    lora_targets: list[str] | None = typer.Option(
        None, help="Layers with an adapter: q_proj,v_proj; may be repeated. Default: all linear layers of the blocks."
    ),
    prefill_weights: str | None = typer.Option(
        None, help="What an adapter is tuned on: 'base', or 'decode', the decode module's own weights. Default: base."
    ),
    epochs: int | None = typer.Option(None, help="Passes over the data. Default: 3."),
    steps: int | None = typer.Option(None, help="Optimizer steps; overrides --epochs."),
    lr: float | None = typer.Option(None, help="Peak learning rate. Default: chosen by the model's width."),
    batch_size: int | None = typer.Option(None, help="Examples per step, over all processes. Default: 16."),
    grad_accum: int | None = typer.Option(None, help="Micro-batches per step. Default: 1."),
    grad_checkpoint: bool | None = typer.Option(
        None, "--grad-checkpoint/--no-grad-checkpoint", help="Recompute activations: less memory, more time."
    ),
    shard: bool | None = typer.Option(None, "--shard/--no-shard", help="Shard all weights over the processes (FSDP)."),
    group_by_length: bool | None = typer.Option(
        None, "--group-by-length/--no-group-by-length", help="Examples of like length in a batch. Default: no."
    ),
    max_len: int | None = typer.Option(None, help="Longest example in tokens; longer ones are skipped. Default: 2048."),
    eval_every: int | None = typer.Option(None, help="Steps between validations. Default: a tenth of the run."),
    seed: int | None = typer.Option(None, help="Random seed for the data's order and the held-out part. Default: 0."),
    dtype: str | None = typer.Option(
        None, help="Dtype of the forward pass: auto, float32, bfloat16, float16. Default: auto."
    ),
    device: str | None = DEVICE,
    config: Path | None = CONFIG,
    resume: bool = RESUME,
    dry_run: bool = DRY_RUN,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    settings, inputs = settings_and_inputs(TuneConfig, locals(), _INPUTS)
    check_device(inputs["device"])
    if inputs["data"] is None:
        raise QsunError("no training data; give --data FILE, or data in the --config file")
    screen.show_warnings()
    from qsun.tuning.job import prepare_tuning
    from qsun.tuning.processes import Processes
    from qsun.tuning.tuner import run_tuning

    job = prepare_tuning(decode, out, config=settings, resume=resume, **inputs)
    processes = Processes.launched(job.device)
    if resume and processes.first:
        screen.note_fresh_start(out)
    plan = job.plan(processes.count)
    if dry_run:
        if processes.first:
            typer.echo(json.dumps(plan) if as_json else "\n".join(_plan_lines(plan)))
        return
    quiet = as_json or not processes.first
    if not quiet:
        for line in _plan_lines(plan):
            screen.note(line)
    try:
        with screen.progress(quiet) as progress:
            report = run_tuning(job, resume, progress)
    except KeyboardInterrupt:
        screen.interrupted("the last saved state, of at most every 30 seconds, is kept: --resume continues")
    if processes.first:
        typer.echo(json.dumps(report) if as_json else "\n".join(_report_lines(report)))


tune.__doc__ = _EXAMPLES


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    left_out = f" ({plan['too_long']} too long and skipped)" if plan["too_long"] else ""
    if plan["unanswered"]:
        left_out += f" ({plan['unanswered']} prompts are answered by the teacher first)"
    memory = f"{plan['memory_bytes'] / 2**20:,.0f} MiB without activations, estimated"
    if plan["shared_bytes"]:
        each = (plan["memory_bytes"] - plan["shared_bytes"] // plan["processes"]) / 2**20
        memory += (
            f" ({plan['shared_bytes'] / 2**20:,.0f} sharded over {plan['processes']} processes, {each:,.0f} in each)"
        )
    return [
        f"{plan['training_examples']} examples to train on{left_out}, {plan['validation_examples']} to validate on",
        f"{plan['steps']} steps of {plan['examples_per_step']} examples, peak learning rate {plan['peak_lr']:.2g}, "
        f"computed in {plan['dtype']} on {plan['device']}",
        f"{plan['weights']:,} weights; {memory}",
    ]


def _report_lines(report: dict[str, Any]) -> list[str]:
    first, best = report["valid_loss"][0][1], report["best_valid_loss"]
    lines = [
        f"{report['out']}: {report['kind']}, validation loss {first:.4f} -> {best:.4f} (step {report['best_step']} of "
        f"{report['train_loss'][-1][0]}), {report['seconds']:.1f} s, {report['seconds_per_step']:.3f} s per step, "
        f"peak {report['peak_rss_bytes'] / 2**20:,.0f} MiB",
        f"read back from disk: {report['saved_valid_loss']:.4f} (curve: report.json, loss.png)",
    ]
    if report["best_step"] == 0:
        lines.append("no step improved on the start, which was saved; try another learning rate")
    return lines
