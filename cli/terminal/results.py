"""What a measuring command leaves: JSON and a picture in a folder, text or JSON on stdout."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from qsun.errors import QsunError


def prepare(out: Path | None) -> None:
    """Create the folder `out`; call it before a measurement, which a wrong --out would otherwise cost.

    Raises:
        QsunError: it cannot be created, or no file can be written to it.
    """
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        fault = "is a file" if out.is_file() else f"cannot be written: {error.strerror}"
        raise QsunError(f"output folder {out} {fault}; choose another --out") from None


def save(out: Path | None, name: str, result: Any, figure: Callable[[], Any] | None = None) -> None:
    """Write NAME.json and, with a figure, NAME.png to a folder that `prepare` made; nothing if that is None."""
    if out is None:
        return
    from qsun.figure import save_figure
    from qsun.model.manifest import write_json

    write_json(out / f"{name}.json", result)
    if figure is not None:
        save_figure(figure(), out / f"{name}.png")


def show(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print a result as one JSON object, or as text."""
    typer.echo(json.dumps(result) if as_json else text(result))
