"""`qsun bench passes`: divergence and CPU seconds of the quantization passes on one model."""

from pathlib import Path

import typer

from qsun.cli.terminal import results, screen
from qsun.cli.terminal.options import names
from qsun.eval.output.table import Table

_COLUMNS = {
    "method": "{method}",
    "grid": "{grid}",
    "KL x1000": "{kl_x1000:.3f}",
    "bits/w": "{bits_per_weight:.3f}",
    "CPU s": "{cpu_seconds:.1f}",
}


def passes(
    model: str = typer.Argument(..., help="Full-precision base: directory or 'demo'."),
    calib: str = typer.Option(..., help="Calibration source, as in qsun quantize."),
    valid: Path = typer.Option(..., help="Held-out text: .npy token ids, or a source as in --calib."),
    grids: str = typer.Option("4s,4a,3s,3a,2s,2a", help="Bits with s (symmetric) or a (asymmetric), comma-separated."),
    methods: str = typer.Option("rtn,awq,gptq,awq+gptq,refined", help="Comma-separated."),
    group_size: int = typer.Option(64, help="-1, 32, 64 or 128."),
    samples: int = typer.Option(128, help="Calibration sequences."),
    seq_len: int = typer.Option(2048, help="Tokens in each."),
    polish: int = typer.Option(0, min=0, help="Then each calibrated method with so many steps of polish, too."),
    windows: int = typer.Option(96, min=1, help="Validation windows for the divergence."),
    window: int = typer.Option(256, min=2, help="Tokens in each."),
    threads: int = typer.Option(1, min=1, help="CPU threads; 1 makes CPU seconds most comparable."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Quantize with several methods; print the KL divergence from the full-precision model and CPU seconds.

    Example:

      qsun bench passes MODEL --calib calib.npy --valid valid.npy --grids 4s,3s,2a
    """
    from qsun.eval.study.passes import compare_passes

    rows = compare_passes(
        model,
        calib,
        valid,
        grids=names(grids),
        methods=names(methods),
        settings={"group_size": group_size, "samples": samples, "seq_len": seq_len, "polish": polish},
        windows=(windows, window),
        threads=threads,
        note=screen.note,
    )
    results.show(rows, as_json, lambda rows: Table.of(rows, _COLUMNS).text())
