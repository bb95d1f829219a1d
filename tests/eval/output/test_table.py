"""One table, as text, Markdown and HTML."""

from qsun.eval.output.table import Table

ROWS = [
    {"name": "sun", "tpot_ms": {"p50": 1.25}, "rate": "91.0 ± 0.5"},
    {"name": "qsun+head", "tpot_ms": None, "rate": "100.0 ± 0.0"},
]
COLUMNS = {"variant": "{name}", "TPOT": "{tpot_ms[p50]:.1f}", "<rate>": "{rate}"}


def test_text_is_aligned_and_a_missing_value_is_a_dash():
    assert Table.of(ROWS, COLUMNS).text().splitlines() == [
        "variant    TPOT       <rate>",
        "sun         1.2   91.0 ± 0.5",
        "qsun+head     -  100.0 ± 0.0",
    ]


def test_markdown_and_html():
    table = Table.of(ROWS, COLUMNS)
    assert table.markdown().splitlines() == [
        "| variant | TPOT | <rate> |",
        "| --- | ---: | ---: |",
        "| sun | 1.2 | 91.0 ± 0.5 |",
        "| qsun+head | - | 100.0 ± 0.0 |",
    ]
    assert "<th>&lt;rate&gt;</th>" in table.html() and "91.0 <small>± 0.5</small>" in table.html()


def test_without_rows_the_columns_remain():
    empty = Table(["a", "b"], [])
    assert empty.text() == "a  b"
    assert empty.markdown() == "| a | b |\n| ---: | ---: |"
