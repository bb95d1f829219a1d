"""`qsun inspect`: describe a model directory."""

import json
from pathlib import Path
from typing import Any

import typer

from qsun.eval.output.table import Table

_COLUMNS = {"layer": "{name}", "bits": "{bits}", "group": "{group_size}", "grid": "{grid}", "error": "{error:.2e}"}


def inspect(
    directory: Path = typer.Argument(..., help="Decode module, LoRA adapter, or any model directory that qsun reads."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Show what a directory contains: layers, bits per weight, errors by layer, and which engines load it.

    Examples:

      qsun inspect out/

      qsun inspect out/ --json | jq .bits_per_weight
    """
    from qsun.model.inspection import describe

    found = describe(directory)
    typer.echo(json.dumps(found) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    if "rank" in found:
        return [
            f"{found['directory']}: {found['kind']} of {found['base']}",
            f"rank {found['rank']}, scale {found['scale']:g}, on {len(found['layers'])} linear layers",
            f"whether it fits a decode module: qsun check-pair {found['directory']} DECODE",
        ]
    lines = [f"{found['directory']}: {found['kind']}, {found['architecture']}, {found['format']}"]
    lines.append(f"{found['bits_per_weight']:.3f} bits per weight in {len(found['layers'])} linear layers")
    if found["manifest"]:
        lines.append(f"made by qsun with {found['manifest']['method']} from {found['manifest']['base']}")
    lines += [f"  {engine}: {answer}" for engine, answer in found["engines"].items()]
    layers = [layer | {"grid": "sym" if layer["sym"] else "asym"} for layer in found["layers"]]
    return [*lines, Table.of(layers, _COLUMNS).text()]
