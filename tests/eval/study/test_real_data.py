"""Rows of the public data sets, from small files in their formats."""

import json

import pytest


def snips_file(folder, name, intent, pieces, encoding="utf-8"):
    folder = folder / "2017-06-custom-intent-engines" / intent
    folder.mkdir(parents=True, exist_ok=True)
    items = [{"data": [{"text": text} | ({"entity": entity} if entity else {}) for text, entity in pieces]}]
    (folder / name).write_bytes(json.dumps({intent: items}, ensure_ascii=False).encode(encoding))


@pytest.fixture
def checkouts(tmp_path):
    snips, django = tmp_path / "snips", tmp_path / "django"
    pieces = [("play  ", None), (" Beyoncé ", "artist"), (" and ", None), ("Air", "artist")]
    snips_file(snips, "train_PlayMusic_full.json", "PlayMusic", pieces, "latin-1")
    snips_file(snips, "train_PlayMusic.json", "PlayMusic", [("not this one", None)])
    snips_file(snips, "validate_GetWeather.json", "GetWeather", [("rain in ", None), ("Oslo", "city")])
    (django / "django").mkdir(parents=True)
    english = [*(f"set x to {n}." for n in range(1600)), "set x to 7.", "long " * 80]
    code = [*(f"x  =  {n}" for n in range(1600)), "x = 8", "y"]
    (django / "django/all.anno").write_text("\n".join(english) + "\n")
    (django / "django/all.code").write_text("\n".join(code) + "\n")
    return snips, django


def test_rows_of_both_formats(cli, checkouts, tmp_path):
    snips, django = checkouts
    answer = cli("bench", "task-data", "-o", tmp_path / "out", "--snips", snips, "--django", django)
    assert answer.code == 0, answer.err
    files = (tmp_path / "out").iterdir()
    rows = {f.stem: [json.loads(line) for line in f.read_text(encoding="utf-8").splitlines()] for f in files}
    assert {name: len(found) for name, found in rows.items()} == {
        "snips-train": 0,
        "snips-valid": 1,
        "snips-test": 1,
        "django-train": 100,
        "django-valid": 500,
        "django-test": 1000,
    }
    assert rows["snips-valid"] == [
        {
            "prompt": "Request: play Beyoncé and Air\nCall:",
            "response": ' {"name": "PlayMusic", "arguments": {"artist": "Beyoncé"}}',
        }
    ]
    assert json.loads(rows["snips-test"][0]["response"]) == {"name": "GetWeather", "arguments": {"city": "Oslo"}}
    lines = [row for name, found in rows.items() if name.startswith("django") for row in found]
    assert len({row["prompt"] for row in lines}) == 1600
    assert {"prompt": "# set x to 7.\n", "response": "x = 7"} in lines, "the first of two with the same prompt"


def test_word_problems_are_a_third_task(cli, checkouts, tmp_path):
    snips, django = checkouts
    folder = tmp_path / "svamp/data/mawps-asdiv-a_svamp"
    folder.mkdir(parents=True)
    problems = "".join(f'"{n} birds, number0 leave",- number0 number1\n' for n in range(310))
    (folder / "train.csv").write_text(f"Question,Equation\n{problems}")
    (folder / "dev.csv").write_text("Numbers,Question,Equation\n1 2,How many ?,+ number0 number1\n")
    out = tmp_path / "out"
    asked = ("bench", "task-data", "-o", out, "--snips", snips, "--django", django, "--svamp", tmp_path / "svamp")
    answer = cli(*asked)
    assert answer.code == 0, answer.err
    rows = {n: (out / f"svamp-{n}.jsonl").read_text().splitlines() for n in ("train", "valid", "test")}
    assert [len(found) for found in rows.values()] == [10, 300, 1]
    wanted = {"prompt": "Problem: How many ?\nEquation:", "response": " + number0 number1"}
    assert json.loads(rows["test"][0]) == wanted
    assert len({*rows["train"], *rows["valid"]}) == 310
    assert rows["valid"] != sorted(rows["valid"], key=lambda row: int(row.split()[2])), "shuffled before the split"
    (folder / "dev.csv").write_text("Text\nx\n")
    wrong = cli(*asked)
    assert (
        wrong.code == 2 and "dev.csv: KeyError('Question'); give a checkout of github.com/arkilpatel/SVAMP" in wrong.err
    )


def test_what_is_no_checkout_is_said_in_one_line(cli, checkouts, tmp_path):
    snips, django = checkouts
    out = ["-o", tmp_path / "out"]
    wrong = cli("bench", "task-data", *out, "--snips", tmp_path, "--django", django)
    assert wrong.code == 2 and "give a checkout of github.com/sonos/nlu-benchmark" in wrong.err
    (django / "django/all.code").write_text("x\n")
    uneven = cli("bench", "task-data", *out, "--snips", snips, "--django", django)
    assert uneven.code == 2 and "all.anno has 1602 lines and all.code 1; they must be pairs" in uneven.err
    (snips / "2017-06-custom-intent-engines/PlayMusic/train_PlayMusic_full.json").write_text("[]")
    other = cli("bench", "task-data", *out, "--snips", snips, "--django", django)
    assert other.code == 2 and "is not a file of the Snips benchmark" in other.err
    assert not (tmp_path / "out").exists()
