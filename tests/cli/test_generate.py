"""`qsun generate`: prompts from everywhere, answers of `qsun.generate`, and one line for what is wrong."""

import io
import json
import sys

import pytest

import qsun
from tests.tiny_models import write_jsonl

PROMPTS = ["calc 12+7>", "rev abcd>", "json foo ab=cd>"]


@pytest.fixture(scope="module")
def answers():
    decode = qsun.load_decode("demo")
    return qsun.generate(qsun.load_prefill("demo", decode), decode, PROMPTS, max_new_tokens=12)


def test_one_prompt(cli, answers):
    assert cli("generate", "demo", PROMPTS[0], "--max-tokens", 12).out == answers[0] + "\n" == "19\n"


def test_several_prompts_in_their_order(cli, answers):
    answer = cli("generate", "demo", *PROMPTS, "--prefill", "demo", "--max-tokens", 12, "--batch-size", 2)
    assert answer.out == "".join(text + "\n" for text in answers)


def test_standard_input_is_one_prompt(cli, answers, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[1]))
    assert cli("generate", "demo", "--max-tokens", 12).out == answers[1] + "\n"


def test_a_file_names_the_module_of_each_prompt(cli, answers, tmp_path):
    rows = [{"prompt": text, "model": "ab"[number % 2]} for number, text in enumerate(PROMPTS)]
    file = write_jsonl(tmp_path / "prompts.jsonl", rows)
    answer = cli(
        "generate", "demo", "--prefill", "a=demo", "--prefill", "b=demo", "--input", file, "--json", "--max-tokens", 12
    )
    found = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["text"] for row in found] == answers
    assert [(row["index"], row["model"]) for row in found] == [(0, "a"), (1, "b"), (2, "a")]
    assert [row["finish"] for row in found] == ["eos", "eos", "length"]
    assert found[2]["tokens"] == 12


def test_chats_go_through_the_template(cli, talking_model, tmp_path):
    from qsun.data.chat import chat_tokens

    decode = qsun.load_decode(talking_model, dtype="float32")
    messages = [{"role": "user", "content": "How many eggs?"}]
    ids = chat_tokens(decode.tokenizer, messages)
    tokens = qsun.generate(qsun.load_prefill(talking_model, decode), decode, [ids], max_new_tokens=8)[0]
    settings = ("--dtype", "float32", "--max-tokens", 8)
    by_option = cli("generate", talking_model, "How many eggs?", "--chat", *settings).out
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages}])
    by_file = json.loads(cli("generate", talking_model, "--input", file, "--json", *settings).out)
    assert by_option == by_file["text"] + "\n" == decode.tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_sampling_settings_arrive(cli):
    settings = ("--temperature", 4, "--top-p", 0.99, "--top-k", 50, "--seed", 3, "--max-tokens", 12)
    first, again, other = (
        cli("generate", "demo", PROMPTS[2], *settings, *more).out for more in ((), (), ("--seed", 4))
    )
    assert first == again != other
    assert cli("generate", "demo", PROMPTS[1], "--stop", "cb").out == "d\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("x", "--input", "f.jsonl"), "not both"),
        (("x", "--prefill", "a=demo", "--prefill", "b=demo"), "several prefill modules"),
        (("x", "--prefill", "a=demo", "--prefill", "a=demo"), "names 'a' twice"),
        (("x", "--prefill", "=demo"), "neither DIR nor NAME=DIR"),
        (("--input", "nowhere.jsonl"), "prompt file nowhere.jsonl does not exist"),
        (("x", "--top-p", 0), "top_p 0.0 is out of range"),
        (("x", "--max-tokens", 0), "max_new_tokens 0 is out of range"),
        (("x", "--dtype", "float7"), "dtype 'float7' is not supported; use one of float32"),
        (("x", "--dtype", "bool"), "dtype 'bool' is not supported; use one of float32"),
        (("x" * 3000,), "max_new_tokens 128 goes over the model's"),
    ],
)
def test_what_is_wrong_is_one_line(cli, arguments, says):
    answer = cli("generate", "demo", *arguments)
    assert answer.code == 2
    assert says in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "line 1: give either 'prompt' or 'messages'"),
        ({"prompt": "x", "model": "c"}, "line 1: 'model' is 'c'; use one of a, b"),
        ({"prompt": "x"}, "line 1: 'model' is None; use one of a, b"),
        ({"prompt": 7, "model": "a"}, "line 1"),
        ({"messages": [{"content": 3}], "model": "a"}, "line 1: the model's chat template refuses"),
    ],
)
def test_a_bad_row_is_named(cli, tmp_path, row, says):
    file = write_jsonl(tmp_path / "prompts.jsonl", [row])
    answer = cli("generate", "demo", "--prefill", "a=demo", "--prefill", "b=demo", "--input", file)
    assert answer.code == 2
    assert says in answer.err
