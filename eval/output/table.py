"""Tables of results, as aligned text for a terminal, as Markdown or as HTML."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells; a column is aligned right unless one of its cells begins with a letter."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> "Table":
        """Build a table of records.

        Args:
            columns: name -> format of its cells, such as "{tpot_ms:.2f}"; a value of None gives "-".
        """
        return cls(list(columns), [[_cell(form, row) for form in columns.values()] for row in rows])

    def text(self) -> str:
        """Return aligned lines that stay readable in a pipe."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = ["<" if left else ">" for left in self._left()]
        return "\n".join(
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        rule = ["---" if left else "---:" for left in self._left()]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows))

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(f'<td>{_small_error(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _left(self) -> list[bool]:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.columns)
        return [any(cell[:1].isalpha() or cell[:1] == "`" for cell in column) for column in columns]


def _cell(form: str, row: Mapping[str, Any]) -> str:
    try:
        return form.format_map(row)
    except TypeError:  # None, or None of a part such as {ttft_ms[p50]}
        return "-"


def _small_error(text: str) -> str:
    """Print the error of a rate small."""
    rate, sign, error = html.escape(text).partition(" ± ")
    return f"{rate} <small>± {error}</small>" if sign else rate
