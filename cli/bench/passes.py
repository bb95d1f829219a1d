"""`qsun bench passes`: divergence and CPU seconds of the passes on one model."""

import json
from pathlib import Path

import typer

from qsun.cli.terminal import screen


def passes(
    model: str = typer.Argument(..., help="Full-precision base: directory or 'demo'."),
    calib: str = typer.Option(..., help="Calibration source, as for qsun quantize."),
    valid: Path = typer.Option(..., help="Held-out text: token ids .npy, or a source as for --calib."),
    grids: str = typer.Option("4s,4a,3s,3a,2s,2a", help="Bits and s(ym) or a(sym), comma-separated."),
    methods: str = typer.Option("rtn,awq,gptq,awq+gptq,refined", help="Comma-separated."),
    group_size: int = typer.Option(64, help="-1, 32, 64 or 128."),
    samples: int = typer.Option(128, help="Calibration sequences."),
    seq_len: int = typer.Option(2048, help="Tokens in each."),
    windows: int = typer.Option(96, help="Validation windows for the divergence."),
    window: int = typer.Option(256, help="Tokens in each."),
    threads: int = typer.Option(1, help="CPU threads; CPU seconds are fairest with 1."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Quantize with several methods and print KL divergence to the full-precision model and CPU seconds.

    Example:

      qsun bench passes MODEL --calib calib.npy --valid valid.npy --grids 4s,3s,2a
    """
    from qsun.eval.study.passes import compare_passes

    rows = compare_passes(
        model,
        calib,
        valid,
        grids=grids.split(","),
        methods=methods.split(","),
        settings={"group_size": group_size, "samples": samples, "seq_len": seq_len},
        windows=(windows, window),
        threads=threads,
        progress=screen.note,
    )
    if as_json:
        typer.echo(json.dumps(rows))
        return
    typer.echo(f"{'method':<10}{'grid':>6}{'KL x1000':>10}{'bits/w':>8}{'CPU s':>8}")
    for row in rows:
        typer.echo(
            f"{row['method']:<10}{row['grid']:>6}{row['kl_x1000']:>10.3f}"
            f"{row['bits_per_weight']:>8.3f}{row['cpu_seconds']:>8.1f}"
        )
