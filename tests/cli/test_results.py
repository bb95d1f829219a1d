"""Where a measurement will be kept is checked before it begins: afterwards it would cost the measurement."""

import json

import pytest

MEASURING = {
    "simulate": ("--curves", "computed:qwen3-1.7b"),
    "bench adapters": (),
    "bench engine": (),
    "bench kernels": (),
    "bench serve": ("http://127.0.0.1:9", "--rate", 1),
    "bench speculation": ("demo", "--data", "nowhere.jsonl"),
    "bench speed": ("--shape", "llama-3.2-1b"),
}


@pytest.mark.parametrize("command", MEASURING)
@pytest.mark.parametrize(("place", "fault"), [("file", "is a file"), ("file/below", "cannot be written: ")])
def test_a_wrong_folder_is_one_line_before_the_measurement(cli, tmp_path, command, place, fault):
    (tmp_path / "file").touch()
    answer = cli(*command.split(), *MEASURING[command], "-o", tmp_path / place)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert f"error: output folder {tmp_path / place} {fault}" in answer.err
    assert "choose another --out" in answer.err


@pytest.mark.parametrize(("place", "says"), [(".", "is a folder; name a file in it"), ("file/x.json", "is a file")])
def test_a_wrong_table_of_launches_is_one_line_before_the_search(cli, tmp_path, place, says):
    (tmp_path / "file").touch()
    answer = cli("bench", "tune-kernels", "-o", tmp_path / place)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert says in answer.err


def test_a_new_folder_is_made_with_those_above_it(cli, tmp_path):
    out = tmp_path / "a" / "b"
    small = ("--models", 1, "--requests", 10, "--rate", 5, "--skew", 0, "--output", "fixed:4")
    answer = cli("simulate", "--curves", "computed:qwen3-1.7b", *small, "--json", "-o", out)
    assert answer.code == 0, answer.err
    assert json.loads((out / "simulate.json").read_text()) == json.loads(answer.out)
    assert sorted(path.name for path in out.iterdir()) == ["simulate.json", "simulate.png"]
