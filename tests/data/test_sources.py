"""Sources of rows, the shapes in which public data sets write them, and rows that are skipped."""

import gzip
import json
import logging
import os
import sys
import weakref
from itertools import count

import pytest

from qsun.data import sources
from qsun.data.calibration import Sample, read_calibration
from qsun.data.jsonl import read_rows
from qsun.data.shapes import RowLeftOut, recognize
from qsun.data.sources import converted_rows, source_rows
from qsun.errors import QsunError
from qsun.tuning.examples import read_examples
from tests.tiny_models import VOCAB, write_jsonl

ROWS = [{"prompt": "abc", "response": "xyz"}, {"prompt": "de", "response": "f"}]
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CSV = b"prompt,response\nabc,xyz\nde,f\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("some.jsonl", lines(ROWS)),
        ("some.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("some.jsonl", lines(ROWS).replace(b"\n", b"\r\n")),
        ("some.jsonl.gz", gzip.compress(lines(ROWS))),
        ("some.json", lines(ROWS)),
        ("some.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode()),
        ("some.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("some.csv", CSV),
        ("some.CSV", CSV),
        ("some.csv.gz", gzip.compress(CSV)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_rows(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert [dict(row) for _, row in source_rows(str(tmp_path / name), "training")] == ROWS


@pytest.mark.parametrize(
    "answer", ["7", "07", "1.50", "None", "null", "NA", "nan", "True", "a,b", "a\r\nb", 'say "a"', "x" * 200_000]
)
def test_every_cell_of_a_csv_file_is_text(answer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # which would guess types, and is not needed
    quoted = answer.replace('"', '""')
    (tmp_path / "some.csv").write_bytes(f'\ufeff\r\nprompt,response\r\na,"{quoted}"\r\n\r\nb,,\r\nc\r\n'.encode())
    rows = [dict(row) for _, row in source_rows(str(tmp_path / "some.csv"), "training")]
    assert rows == [{"prompt": prompt, "response": text} for prompt, text in (("a", answer), ("b", None), ("c", None))]


def test_a_parquet_file_gets_no_keys_that_only_other_rows_have(tmp_path):
    """A table has the same keys in every row; nulls in the schema of a tool would change the prompt."""
    tools = [[{"name": "f", "kind": "x"}], [{"name": "g"}]]
    parquet.write_table(pyarrow.table({"tools": tools, "prompt": ["a", None]}), tmp_path / "some.parquet")
    (_, first), (_, second) = source_rows(str(tmp_path / "some.parquet"), "training")
    assert [first["tools"], second["tools"]] == tools
    assert second["prompt"] is None


@pytest.fixture
def data_set(tmp_path):
    """A folder with two configurations, one of them with two splits."""
    for place, letter in (("raw/train", "r"), ("raw/test", "t"), ("v1/train", "v")):
        path = tmp_path / "ds" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({"text": [letter]}), path)
    (tmp_path / "ds" / "README.md").write_text(
        "---\nconfigs:\n- config_name: raw\n  data_files:\n  - split: train\n    path: raw/train.parquet\n"
        "  - split: test\n    path: raw/test.parquet\n- config_name: v1\n  data_files: v1/*.parquet\n---\n"
    )
    return tmp_path / "ds"


@pytest.mark.parametrize(("ending", "letter"), [("raw:train", "r"), ("raw:test", "t"), ("v1:train", "v"), ("v1:", "v")])
def test_a_configuration_and_a_split(ending, letter, data_set):
    assert [row["text"] for _, row in source_rows(f"{data_set}:{ending}", "calibration")] == [letter]


def test_a_missing_configuration_says_how_to_name_one(data_set):
    with pytest.raises(QsunError, match=r"ID:SPLIT or ID:CONFIG:SPLIT: .*raw") as error:
        list(source_rows(f"{data_set}", "calibration"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", b"not compressed", "is not a valid gzip file"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-9], "is not a valid gzip file"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', "not valid JSON .* at line 2, column"),
        ("a.json", b'[{"prompt": "a"}, 3]', "row 2: not a JSON object"),
        ("a.parquet", b"not a table", "cannot be loaded"),
        ("a.csv", b'prompt,response\na,b\nc,"d\n', "line 3: not valid CSV .unexpected end of data.; check its quotes"),
        ("a.csv", b"prompt,response\na,b\nc,d,e\n", "row 2: has more cells than the 2 names in the first line; quote"),
        ("a.csv", b"prompt,response\na,\xff\n", "line 2: not valid UTF-8"),
    ],
)
def test_damaged_files(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QsunError, match=says) as error:
        list(source_rows(str(tmp_path / name), "training"))
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shells_pipe_and_a_file_without_a_suffix_hold_lines_of_json(demo_tokenizer, tmp_path, pipe):
    (tmp_path / "rows").write_bytes(lines(ROWS))
    assert [dict(row) for _, row in source_rows(str(tmp_path / "rows"), "training")] == ROWS
    for read in (
        lambda name: len(read_examples([name], demo_tokenizer, 100)[0]),
        lambda name: len(read_calibration([name], demo_tokenizer, VOCAB, 2, 100, seed=0).samples),
    ):
        assert read(pipe(lines(ROWS).decode())) == 2


@pytest.mark.parametrize("name", ["a.parquet", "a.npy"])
def test_what_is_read_from_several_places_cannot_be_a_pipe(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(QsunError, match=f"{name} is a pipe, which can be read only once; save it to a file first"):
        read_calibration([str(tmp_path / name)], None if name == "a.npy" else object(), VOCAB, 2, 100, seed=0)


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(QsunError, match="is a folder; name a file in it"):
        list(read_rows(tmp_path, "trace"))


@pytest.mark.parametrize("value", ["1" + "0" * 5000, "[" * 100_000])
def test_json_that_python_does_not_read(value, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": ' + value)
    with pytest.raises(QsunError, match="line 1: a number has too many digits, or the value nests too deep"):
        list(read_rows(tmp_path / "a.jsonl", "trace"))


@pytest.mark.parametrize("name", ["none.jsonl", "none.json.gz", "none.parquet", "none.csv"])
def test_files_that_do_not_exist(name, tmp_path):
    with pytest.raises(QsunError, match="does not exist"):
        list(source_rows(str(tmp_path / name), "training"))


# --- shapes


CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
SHARED = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": CHAT}, CHAT),
        ({"conversations": SHARED}, CHAT),
        ({"conversation": CHAT}, CHAT),
        ({"conversations": SHARED, "system": "s"}, [{"role": "system", "content": "s"}, *CHAT]),
        ({"conversations": SHARED, "system": ""}, CHAT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
        ({"messages": CHAT, "prompt": "ab", "response": "x"}, CHAT),
    ],
)
def test_chats(row, messages):
    plain, note = recognize(row, "here")
    assert plain["messages"] == messages
    assert bool(note) != ("messages" in row)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "ab", "response": "cd"}, "ab"),
        ({"prompt": "ab", "completion": "cd"}, "ab"),
        ({"instruction": "ab", "input": "", "output": "cd"}, "ab"),
        ({"instruction": "ab", "input": "in", "output": "cd"}, "ab\n\nin"),
        ({"instruction": "ab", "context": "in", "response": "cd"}, "ab\n\nin"),
        ({"question": "ab", "answer": "cd"}, "ab"),
        ({"query": "ab", "response": "cd"}, "ab"),
    ],
)
def test_pairs(row, prompt):
    plain, note = recognize(row, "here")
    assert (plain["prompt"], plain["response"]) == (prompt, "cd")
    assert bool(note) != (set(row) == {"prompt", "response"})


def test_an_unknown_speaker():
    with pytest.raises(QsunError, match="here: a message is from 'narrator'; known are human, user"):
        recognize({"conversations": [{"from": "narrator", "value": "a"}]}, "here")


@pytest.mark.parametrize("row", [{"messages": None}, {"text": None}, {"prompt": None, "response": "a"}])
def test_a_null_is_left_out(row):
    with pytest.raises(RowLeftOut, match="is null"):
        recognize(row, "here")


def test_the_shape_is_said_once(demo_tokenizer, tmp_path, caplog):
    path = write_jsonl(tmp_path / "some.jsonl", [{"question": "a", "answer": "b"}] * 3)
    examples, _ = read_examples([str(path)], demo_tokenizer, 100)
    assert demo_tokenizer.decode(examples[0].prompt) == "<s>a"
    (record,) = caplog.records
    assert "'question' is read as the prompt and 'answer' as the response" in record.message


# --- rows that are left out


BAD = [{"prompt": None, "response": "a"}, {"messages": None}, {"messages": CHAT[:1]}]


def test_bad_rows_among_good_ones_are_counted(demo_tokenizer, tmp_path, caplog):
    path = write_jsonl(tmp_path / "some.jsonl", [ROWS[0], *BAD, ROWS[1]])
    examples, _ = read_examples([str(path)], demo_tokenizer, 100)
    assert len(examples) == 2
    samples = read_calibration([str(path)], demo_tokenizer, VOCAB, 2, 100, seed=0).samples
    assert len(samples) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all("left out 3 rows; the first: " in record.message for record in caplog.records)
    assert all("line 2: 'prompt' is null" in record.message for record in caplog.records)


def test_one_long_prompt_does_not_stop_calibration(demo_tokenizer, tmp_path, caplog):
    rows = [*ROWS, {"prompt": "x" * 40, "response": "b"}]
    found = read_calibration([str(write_jsonl(tmp_path / "a.jsonl", rows))], demo_tokenizer, VOCAB, 2, 32, seed=0)
    assert found.samples == (
        Sample((1, *map(ord, "abcxyz")), prefill_tokens=3),
        Sample((1, *map(ord, "def")), prefill_tokens=2),
    )
    assert "left out 1 rows; the first: calibration file" in caplog.text
    assert "line 3: the prompt of 41 tokens leaves no response within --seq-len 32" in caplog.text


def test_only_bad_rows(demo_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", BAD)
    for read in (
        lambda: read_examples([str(path)], demo_tokenizer, 100),
        lambda: read_calibration([str(path)], demo_tokenizer, VOCAB, 2, 100, seed=0),
    ):
        with pytest.raises(QsunError, match="line 1: 'prompt' is null"):
            read()


class Row(dict):
    """A row that can be referred to weakly."""


def test_rows_that_are_left_out_are_not_kept(monkeypatch):
    seen = []

    def rows(*_):
        for number in range(50):
            row = Row(prompt=None, response="a")
            seen.append(weakref.ref(row))
            yield f"row {number}", row
        yield "the last", ROWS[0]

    monkeypatch.setattr(sources, "source_rows", rows)
    assert converted_rows("some", "training", lambda row, _: [row]) == [ROWS[0]]
    assert [ref() for ref in seen[:-1]] == [None] * 49


def test_an_endless_set_without_a_usable_row_ends(monkeypatch):
    monkeypatch.setattr(sources, "_LEFT_OUT_AT_MOST", 1000)
    good = {10, 900}

    def rows(*_):
        for number in count():
            assert number < 2000, "it reads on"
            yield f"row {number}", ROWS[0] if number in good else {"text": None}

    monkeypatch.setattr(sources, "source_rows", rows)
    says = "data some: 1,000 consecutive rows cannot be used; give other data; the first .*: row 0: 'text' is null"
    with pytest.raises(QsunError, match=says):
        converted_rows("some", "training", lambda row, _: [row])
