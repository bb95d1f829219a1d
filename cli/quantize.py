"""`qsun quantize`: one command from a model directory to a decode module."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.device import check_device
from qsun.cli.terminal.options import CONFIG, DEVICE, DRY_RUN, RESUME, settings_and_inputs
from qsun.config import FORMATS, METHODS, QuantConfig
from qsun.errors import shortened

EXAMPLES = """Quantize the decode module of a model: a Hugging Face directory, a hub id, or [bold]demo[/].

Examples:

  qsun quantize demo -o out/

  qsun quantize ./Llama-3.1-8B -o ./Llama-3.1-8B-int4 --calib tasks.jsonl

  qsun quantize ./Qwen3-8B -o out/ --bits 3 --group-size 64 --format compressed-tensors

  qsun quantize ./Qwen3-8B -o out/ --bits 2 --calib math.jsonl --calib-prefill P1 --calib code.jsonl --calib-prefill P2

  qsun quantize ./Qwen3-8B -o out/ --bits 2 --group-size 64 --polish 100

  qsun quantize ./Llama-3.1-8B -o out/ --override 'down_proj=bits:8' --dry-run

The output directory appears complete or not at all; --resume continues an interrupted run.
"""
_INPUTS = {"calib": list, "calib_prefill": list, "served": list, "device": str}


def quantize(
    model: str = typer.Argument(..., help="Model directory, hub id, or 'demo'."),
    out: Path = typer.Option(..., "--out", "-o", help="Directory to create."),
    method: str | None = typer.Option(None, help=f"{', '.join(METHODS)}. Default: refined."),
    bits: int | None = typer.Option(None, help="2, 3, 4 or 8. Default: 4."),
    group_size: int | None = typer.Option(None, help="-1, 32, 64 or 128. Default: 128."),
    sym: bool | None = typer.Option(None, "--sym/--asym", help="Symmetric or asymmetric grid. Default: sym."),
    desc_act: bool | None = typer.Option(
        None, "--desc-act/--no-desc-act", help="Form groups in activation order (gptq format)."
    ),
    polish: int | None = typer.Option(
        None, help="Steps in which the scales of all layers then learn together, for 2 and 3 bits. Default: 0."
    ),
    lm_head: bool | None = typer.Option(None, "--lm-head/--no-lm-head", help="Also quantize the output projection."),
    calib: list[str] | None = typer.Option(
        None, help="Calibration: .txt, .jsonl, .npy, a data set id, or 'builtin'; may be repeated. Default: builtin."
    ),
    calib_prefill: list[str] | None = typer.Option(
        None,
        "--calib-prefill",
        help="Prefill module that reads the prompts of the --calib in the same position; may be repeated. "
        "Default: the base reads them.",
    ),
    served: list[str] | None = typer.Option(
        None, help="Prefill module that will be served: warn if calibration does not cover it. May be repeated."
    ),
    samples: int | None = typer.Option(None, help="Calibration sequences. Default: 128."),
    seq_len: int | None = typer.Option(None, help="Tokens per sequence. Default: 2048."),
    format: str | None = typer.Option(None, help=f"{', '.join(FORMATS)}. Default: gptq."),
    overrides: list[str] | None = typer.Option(
        None, "--override", help="Per-layer settings, 'REGEX=bits:8,group_size:32' or 'REGEX=skip'; may be repeated."
    ),
    seed: int | None = typer.Option(None, help="Random seed for sampling calibration data. Default: 0."),
    dtype: str | None = typer.Option(
        None, help="Dtype of the computation: auto, float32, bfloat16, float16. Default: auto."
    ),
    device: str | None = DEVICE,
    config: Path | None = CONFIG,
    resume: bool = RESUME,
    dry_run: bool = DRY_RUN,
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    settings, inputs = settings_and_inputs(QuantConfig, locals(), _INPUTS)
    check_device(inputs["device"])
    screen.show_warnings()
    from qsun.quantization.job import prepare
    from qsun.quantization.run import run_job

    job = prepare(model, out, settings, inputs["calib"], inputs["device"], resume, inputs["calib_prefill"] or ())
    _warn_of_unserved(inputs["served"] or [], job.prefill.names, model)
    if resume:
        screen.note_fresh_start(out)
    if dry_run:
        results.show(asdict(job.plan), as_json, _plan_text)
        return
    if job.calibration is not None and not as_json:
        screen.note(f"calibration: {len(job.calibration.samples)} samples from {job.calibration.source}; the first:")
        screen.note("  " + shortened(job.calibration.preview, 240))
    try:
        with screen.progress(quiet=as_json) as progress:
            report = run_job(job, resume, progress)
    except KeyboardInterrupt:
        screen.interrupted("finished blocks are kept, --resume continues")
    results.show(report, as_json, _report_text)


def _warn_of_unserved(served: list[str], covered: tuple[str, ...], model: str) -> None:
    """Warn of served prefill modules whose task calibration does not see. Raises QsunError for one that cannot fit."""
    from qsun.model.pairing import check_pair
    from qsun.quantization.prefill_activations import unserved

    for name in served:
        check_pair(name, model)
    for name in unserved(served, covered):
        screen.note(
            f"warning: calibration does not cover served module {name}; at 2 and 3 bits its answers may be lost: "
            f"add --calib DATA --calib-prefill {name}"
        )


def _plan_text(plan: dict[str, Any]) -> str:
    lines = [
        f"{plan['quantized_layers']} layers in {plan['blocks']} blocks to quantize, "
        f"{plan['full_precision_layers']} left in full precision",
        f"{plan['calibration_tokens']} calibration tokens, computed in {plan['dtype']} on {plan['device']}",
    ]
    if plan["prefill_modules"]:
        lines.append(f"prompt tokens read by {plan['prefill_modules']} prefill modules: {plan['prefill_tokens']}")
    if plan["polish_steps"]:
        lines.append(f"then {plan['polish_steps']} steps of polish")
    for label, key in (
        ("output", "output_bytes"),
        ("peak RAM, estimated", "peak_ram_bytes"),
        ("peak VRAM, estimated", "peak_vram_bytes"),
    ):
        if plan[key]:
            lines.append(f"{label:<22}{plan[key] / 2**20:>12,.1f} MiB")
    return "\n".join(lines)


def _report_text(report: dict[str, Any]) -> str:
    worst = max(report["layers"], key=lambda layer: layer["error"], default=None)
    lines = [
        f"{report['out']}: {len(report['layers'])} layers, {report['bits_per_weight']:.3f} bits a weight, "
        f"{report['seconds']:.1f} s, peak {report['peak_rss_bytes'] / 2**20:,.0f} MiB",
    ]
    if report["polish"]:
        curve, kept = dict(report["polish"]["divergence"]), report["polish"]["kept"]
        lines.append(
            f"polish: divergence of held-out samples {curve[0]:.4f} -> {curve[kept]:.4f} nats a token "
            f"(step {kept} of {report['polish']['steps']})"
        )
    if worst:
        lines.append(f"largest error: {worst['error']:.2e} in {worst['name']} (all: report.json, errors.png)")
    lines += [f"  {engine}: {answer}" for engine, answer in report["engines"].items()]
    return "\n".join(lines)
