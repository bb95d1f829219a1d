"""`qsun check-pair`: check that a prefill module and a decode module are compatible."""

import json

import typer

from qsun.cli.terminal import screen


def check_pair(
    prefill: str = typer.Argument(..., help="Prefill module: directory, LoRA adapter, hub id or 'demo'."),
    decode: str = typer.Argument(..., help="Decode module, or a full-precision base: directory, hub id or 'demo'."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Compare everything that the two modules of a pair must agree on. Exit code 2 if they differ.

    Examples:

      qsun check-pair tuned/math out/int4

      qsun check-pair demo demo --json
    """
    from qsun.model.pairing import differences, uncovered

    found = differences(prefill, decode)
    warning = None if found else uncovered(prefill, decode)
    if as_json:
        typer.echo(json.dumps({"fits": not found, "differences": found, "warning": warning}))
    else:
        for line in found:
            screen.error(line)
        if warning:
            screen.note(f"warning: {warning}")
        if not found:
            typer.echo("OK")
    if found:
        raise typer.Exit(2)
