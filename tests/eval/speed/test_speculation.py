"""`qsun bench speculation`: counts that a naive generator gives too, and answers that drafts do not change."""

import json

import pytest

import qsun
from qsun.data.examples import TokenExample
from qsun.eval.speed.speculation import compare_speculation
from tests.tiny_models import build_model, write_jsonl


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = build_model(tmp_path_factory.mktemp("speculation") / "base", "llama")
    decode = qsun.load_decode(directory, "cpu", "float32")
    return decode, qsun.load_prefill(directory, decode, "float32")


def test_steps_are_counted_and_answers_compared(pair):
    decode, prefill = pair
    prompts = [(5, 6, 7), (9,), (3, 4) * 6, (11, 12, 13, 14), (8, 8, 8)]
    examples = [TokenExample(prompt, (1,)) for prompt in prompts]
    rows = compare_speculation(decode, prefill, examples, 2, [6], 40)
    assert [(row["batch"], row["drafts"]) for row in rows] == [(2, 0), (2, 6)]
    assert all(row["same"] == row["answers"] == 5 for row in rows)
    answers = qsun.generate(prefill, decode, [list(prompt) for prompt in prompts], max_new_tokens=40)
    steps = sum(max(len(answer) for answer in answers[start : start + 2]) for start in (0, 2, 4))
    assert rows[0]["tokens_per_step"] == pytest.approx(sum(map(len, answers)) / steps / 2)
    assert rows[0]["accepted"] is None and rows[0]["speedup"] == 1
    assert rows[1]["tokens_per_step"] > rows[0]["tokens_per_step"]  # greedy answers of a random model end in loops


def test_the_command(cli, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "calc 1+2>", "response": "3"}] * 2)
    answer = cli("bench", "speculation", "demo", "--data", data, "--batch", "1", "--drafts", "0,3", "--json")
    assert answer.code == 0, answer.err
    assert [row["drafts"] for row in json.loads(answer.out)["rows"]] == [0, 3]
    wrong = cli("bench", "speculation", "demo", "--data", data, "--batch", "one")
    assert wrong.code != 0 and "whole numbers" in wrong.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch", "1,0"), "batch has 0; use whole numbers from 1 up"),
        (("--batch", ""), "batch is empty; use sizes of 1 or more"),
        (("--max-tokens", 512), "max_tokens 512 leaves no room for a prompt in the model's 512 positions"),
    ],
)
def test_wrong_options_are_one_clear_line(cli, tmp_path, options, says):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "calc 1+2>", "response": "3"}])
    answer = cli("bench", "speculation", "demo", "--data", data, *options)
    assert answer.code == 2 and says in answer.err and answer.err.count("\n") == 1, answer.err
