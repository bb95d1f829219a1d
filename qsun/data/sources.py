"""Sources of training and calibration rows: JSON files, tables and Hugging Face data sets."""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qsun.data.jsonl import PlacedRow, check_no_pipe, file_text, read_rows
from qsun.data.shapes import RowLeftOut, recognize
from qsun.errors import QsunError, shortened

log = logging.getLogger(__name__)
T = TypeVar("T")
_LEFT_OUT_AT_MOST = 100_000  # consecutive rows, since a data set can be endless
FILES = ".jsonl, .json, .parquet or .csv file (.gz as well)"


def converted_rows(
    name: str,
    what: str,
    convert: Callable[[Mapping[str, Any], str], Iterable[T]],
    most: int | None = None,
    weight: Callable[[T], int] = lambda _: 1,
    needs_response: bool = True,
) -> list[T]:
    """Read a source and convert its rows, which `recognize` has brought to one of a few shapes.

    Rows that cannot be used are left out; how many, and why the first of them, is logged in one line.

    Args:
        convert: from a row, and the words that name it in an error, to results; may raise RowLeftOut.
        most: stop once the results weigh this much, since a data set can be endless.
        weight: of a result; each weighs one by default.
        needs_response: see `recognize`.
    Raises:
        QsunError: an unreadable source, a row of an unknown shape, or 100,000 consecutive rows, or all, unusable.
    """
    results: list[T] = []
    notes: set[str] = set()
    first, left_out, consecutive, weighed = "", 0, 0, 0
    for where, row in source_rows(name, what):
        try:
            plain, note = recognize(row, where, needs_response)
            found = list(convert(plain, where))  # all that a row gives, or nothing
        except RowLeftOut as reason:
            first, left_out, consecutive = first or str(reason), left_out + 1, consecutive + 1
            if consecutive == _LEFT_OUT_AT_MOST:
                raise QsunError(
                    f"{what} data {name}: {consecutive:,} consecutive rows cannot be used; give other data; "
                    f"the first row left out: {first}"
                ) from None
            continue
        results += found
        consecutive, weighed = 0, weighed + sum(map(weight, found))
        if note and note not in notes:
            notes.add(note)
            log.warning("%s data %s: %s", what, name, note)
        if most is not None and weighed >= most:
            break
    if left_out and not results:
        raise QsunError(first)
    if left_out:
        log.warning("%s data %s: left out %d rows; the first: %s", what, name, left_out, first)
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
    elif kind == ".csv":
        yield from _csv_rows(path, what)
    elif kind == ".parquet":
        check_no_pipe(path, what)
        if not path.is_file():
            raise QsunError(f"{what} file {name} does not exist")
        yield from _loaded(f"{what} data {name}", path="parquet", data_files=str(path), split="train")
    else:
        data_set, *rest = name.rsplit(":", 2) if name.count(":") > 1 else name.split(":")
        split = rest.pop() if rest else ""
        configuration = rest[0] if rest else None
        yield from _loaded(f"{what} data {name}", path=data_set, name=configuration, split=split or "train")


def file_kind(name: str) -> str:
    """Return the suffix of a file's name in lower case, without .gz."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _csv_rows(path: Path, what: str) -> Iterator[PlacedRow]:
    """Yield the rows of a .csv file; every cell is text, and an empty one None."""
    text, file = file_text(path, what), f"{what} file {path}"
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a document may have more than 131,072 characters
    rows = csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline=""), strict=True)
    try:
        for number, row in enumerate(rows, 1):
            where = f"{file}, row {number}"
            if any(row.pop(None, ())):  # more cells than names; empty ones do no harm
                names = len(rows.fieldnames or ())
                raise QsunError(f"{where}: has more cells than the {names} names in the first line; quote its commas")
            yield where, {key: value or None for key, value in row.items()}
    except csv.Error as error:
        raise QsunError(f"{file}, line {rows.line_num + 1}: not valid CSV ({error}); check its quotes") from None


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
