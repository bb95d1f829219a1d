"""From a command's options, and the YAML file that --config names, to the settings object of what it calls."""

import math
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import typer

from qsun.config import Settings, read_config_file
from qsun.errors import QsunError

S = TypeVar("S", bound=Settings)
# options that several commands have
CONFIG = typer.Option(None, help="YAML file of settings and inputs; command-line options override it.")
DEVICE = typer.Option(None, help="cpu, cuda, cuda:1 ... Default: a GPU if available.")
DRY_RUN = typer.Option(False, "--dry-run", help="Check everything and print the plan without writing anything.")
KV_DTYPE = typer.Option(
    "auto", help="Dtype of the decode batch's KV: auto is that of activations, fp8 takes half of 16 bits."
)
RESUME = typer.Option(False, "--resume", help="Continue an interrupted run.")


def settings_and_inputs(
    kind: type[S], options: Mapping[str, Any], inputs: Mapping[str, type]
) -> tuple[S, dict[str, Any]]:
    """Return the settings and the inputs of a command. Options win over the file, and the file over defaults.

    Args:
        kind: settings class; options and fields are matched by name.
        options: every option of the command by name (`locals()` in its first line); None means not given. Its
            `config`, where there is one, names the file.
        inputs: options that are no settings, such as data, and that the file may hold too: str, or list for those
            that may be repeated.
    Returns:
        The settings, and a value or None for each input.
    Raises:
        QsunError: the file cannot be read, or one of its keys or a value is invalid.
    """
    file = options.get("config")
    found = read_config_file(file) if file else {}
    beside = {
        name: _texts(f"{name} in config file {file}", found.pop(name), inputs[name]) for name in inputs if name in found
    }
    given = {name: value for name, value in options.items() if value is not None}
    settings = kind.from_dict(found | {name: given[name] for name in signature(kind).parameters if name in given})
    return settings, {name: given.get(name, beside.get(name)) for name in inputs}


def _texts(name: str, value: Any, kind: type) -> Any:
    """Return a text, or a list of texts, of which one may stand alone. Raises QsunError for anything else."""
    texts = value if isinstance(value, list) and kind is list else [value]
    if not all(isinstance(text, str) for text in texts):
        raise QsunError(f"{name}: {value!r} is not a string{' or a list of strings' if kind is list else ''}")
    texts = [str(Path(text).expanduser()) if text.startswith("~/") else text for text in texts]
    return texts if kind is list else texts[0]


def names(text: str) -> list[str]:
    """Parse a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(name: str, text: str, least: int = 1) -> list[int]:
    """Parse a comma-separated option. Raises QsunError for anything but whole numbers from `least` up."""
    parts = names(text)
    wrong = [part for part in parts if not part.isdecimal() or int(part) < least]
    if wrong:
        raise QsunError(f"{name} has {wrong[0]}; use whole numbers from {least} up, such as 1,4,16")
    return [int(part) for part in parts]


def numbers(name: str, text: str) -> list[float]:
    """Parse a comma-separated option. Raises QsunError for anything but finite numbers."""
    try:
        found = [float(part) for part in names(text)]
    except ValueError:
        raise QsunError(f"{name} {text!r} is not a comma-separated list of numbers") from None
    if not all(math.isfinite(number) for number in found):
        raise QsunError(f"{name} {text!r} has a number that is not finite")
    return found
