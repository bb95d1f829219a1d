"""What a measuring command leaves: JSON and a picture in a folder, text or JSON on stdout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


def save(out: Path | None, name: str, result: Any, figure: Callable[[], Any] | None = None) -> None:
    """Write NAME.json and, with a figure, NAME.png to the folder `out`; nothing if that is None."""
    if out is None:
        return
    from qsun.figure import save_figure
    from qsun.model.manifest import write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)
    if figure is not None:
        save_figure(figure(), out / f"{name}.png")


def show(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print a result as one JSON object, or as text."""
    typer.echo(json.dumps(result) if as_json else text(result))
