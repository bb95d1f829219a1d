"""Sources of training and calibration rows: JSON files, tables and Hugging Face data sets."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qsun.data.jsonl import PlacedRow, check_no_pipe, read_rows
from qsun.data.shapes import RowLeftOut, recognize
from qsun.errors import QsunError, shortened

log = logging.getLogger(__name__)
T = TypeVar("T")
_TABLES = {".parquet": "parquet", ".csv": "csv"}
FILES = ".jsonl, .json, .parquet or .csv file (.gz as well)"


def converted_rows(
    name: str,
    what: str,
    convert: Callable[[Mapping[str, Any], str], Iterable[T]],
    most: int | None = None,
    needs_response: bool = True,
) -> list[T]:
    """Read a source and convert its rows, which `recognize` has brought to one of a few shapes.

    Rows that cannot be used are left out; how many, and why the first of them, is logged in one line.

    Args:
        convert: from a row, and the words that name it in an error, to results; may raise RowLeftOut.
        most: stop after this many results, since a data set can be endless.
        needs_response: see `recognize`.
    Raises:
        QsunError: an unreadable source, a row of an unknown shape, or no row that can be used.
    """
    results: list[T] = []
    reasons: list[RowLeftOut] = []
    notes: set[str] = set()
    for where, row in source_rows(name, what):
        try:
            plain, note = recognize(row, where, needs_response)
            results += convert(plain, where)
        except RowLeftOut as reason:
            reasons.append(reason)
            continue
        if note and note not in notes:
            notes.add(note)
            log.warning("%s data %s: %s", what, name, note)
        if most is not None and len(results) >= most:
            break
    if reasons and not results:
        raise QsunError(str(reasons[0]))
    if reasons:
        log.warning("%s data %s: left out %d rows; the first: %s", what, name, len(reasons), reasons[0])
    return results


def source_rows(name: str, what: str) -> Iterator[PlacedRow]:
    """Yield the rows of a file, or of a data set named ID, ID:SPLIT or ID:CONFIG:SPLIT; a folder on disk is one too.

    A file without a suffix, such as the pipe of a shell's <(command), holds lines of JSON.

    what: the role of the data in the command, for errors.
    """
    path = Path(name)
    kind = file_kind(name)
    if kind in (".jsonl", ".json") or (not kind and path.exists() and not path.is_dir()):
        yield from read_rows(path, what)
    elif kind in _TABLES:
        check_no_pipe(path, what)
        if not path.is_file():
            raise QsunError(f"{what} file {name} does not exist")
        yield from _loaded(f"{what} data {name}", path=_TABLES[kind], data_files=str(path), split="train")
    else:
        data_set, *rest = name.rsplit(":", 2) if name.count(":") > 1 else name.split(":")
        split = rest.pop() if rest else ""
        configuration = rest[0] if rest else None
        yield from _loaded(f"{what} data {name}", path=data_set, name=configuration, split=split or "train")


def file_kind(name: str) -> str:
    """Return the suffix of a file's name in lower case, without .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _loaded(where: str, **source: Any) -> Iterator[PlacedRow]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise QsunError(
            f"{where} needs the package datasets: pip install 'qsun[data]', or give a .jsonl file"
        ) from None
    try:
        for number, row in enumerate(load_dataset(**source, streaming=True)):
            yield f"{where}, row {number}", {key: _without_nulls(value) for key, value in row.items()}
    except Exception as error:  # many kinds, down to those of its HTTP library
        raise QsunError(
            f"{where} is not a {FILES}, and cannot be loaded as a data set ID, ID:SPLIT or "
            f"ID:CONFIG:SPLIT: {shortened(error, 200)}"
        ) from None


def _without_nulls(value: Any) -> Any:
    """Remove the keys that a table adds to nested objects so that all rows have the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
