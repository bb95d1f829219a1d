"""Rows of JSON files, each with the words that name it in an error."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsun.errors import QsunError

PlacedRow = tuple[str, Mapping[str, Any]]  # where it lies, for errors, and its values
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: Path, what: str) -> Iterator[PlacedRow]:
    """Yield the objects of a .jsonl file, or of a .json file's one list; either may be compressed (.gz).

    Args:
        what: the file's role in the command, for errors.
    Raises:
        QsunError: no such file, not UTF-8, not JSON, or something else than an object; names the file and the line.
    """
    content, file = file_bytes(path, what), f"{what} file {path}"
    if ".json" in [suffix.lower() for suffix in path.suffixes] and content.lstrip()[:1] == b"[":
        for number, row in enumerate(_parse(content, file), 1):
            yield _as_object(row, f"{file}, row {number}")
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield _as_object(_parse(line, where), where)


def file_bytes(path: Path, what: str) -> bytes:
    """Return the content of a file or a pipe, decompressed and without a byte order mark.

    Raises:
        QsunError: no such file, a folder, or not compressed as its name says.
    """
    if not path.exists():
        raise QsunError(f"{what} file {path} does not exist")
    if path.is_dir():
        raise QsunError(f"{what} file {path} is a folder; name a file in it")
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise QsunError(f"{what} file {path} is not a valid gzip file: {error}") from None
    return content.removeprefix(_BYTE_ORDER_MARK)


def file_text(path: Path, what: str) -> str:
    """Return the text of a file. Raises QsunError as `file_bytes`, and where it is not UTF-8; names the line."""
    try:
        return file_bytes(path, what).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise QsunError(f"{what} file {path}, line {line}: not valid UTF-8 ({error.reason})") from None


def check_no_pipe(path: Path, what: str) -> None:
    """Raise QsunError for a pipe, where a file is read several times or from several places."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise QsunError(f"{what} file {path} is a pipe, which can be read only once; save it to a file first")


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise QsunError(f"{where}: not valid UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise QsunError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except (ValueError, RecursionError):
        raise QsunError(f"{where}: a number has too many digits, or the value nests too deep") from None


def _as_object(row: Any, where: str) -> PlacedRow:
    if not isinstance(row, dict):
        raise QsunError(f"{where}: not a JSON object")
    return where, row


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return a row's text. Raises QsunError if it is not text, or not valid Unicode."""
    if not isinstance(row[key], str):
        raise QsunError(f"{where}: {key!r} is {row[key]!r:.40}, not text")
    check_text(row[key], where)
    return row[key]


def check_text(text: str, where: str) -> None:
    """Raise QsunError for half of a surrogate pair, which JSON can spell and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise QsunError(f"{where}: {text[error.start]!a} is half of a surrogate pair, not a character") from None
