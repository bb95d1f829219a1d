"""Rows of a .jsonl file, each with the words that name it in an error."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsun.errors import QsunError


def read_rows(path: Path, what: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of every line that is not empty.

    Args:
        what: the file's part in the command, for errors.
    Raises:
        QsunError: no such file, not UTF-8, not JSON, or a line that is no object; names the file and the line.
    """
    if not path.is_file():
        raise QsunError(f"{what} file {path} does not exist")
    number = 0
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{what} file {path}, line {number}"
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise QsunError(f"{where}: not valid UTF-8 ({error.reason})") from None
        except json.JSONDecodeError as error:
            raise QsunError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise QsunError(f"{where}: not a JSON object")
        yield where, row


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A row's text. Raises QsunError where it is none, or no Unicode."""
    if not isinstance(row[key], str):
        raise QsunError(f"{where}: {key!r} is {row[key]!r:.40}, not text")
    return checked_text(row[key], where)


def checked_text(text: str, where: str) -> str:
    """The text itself. JSON can spell half of a surrogate pair, which no tokenizer takes: QsunError for that."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QsunError(f"{where}: half of a surrogate pair, {text[error.start]!a}, is no character") from None
    return text
