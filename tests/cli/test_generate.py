"""`qsun generate`: prompts from everywhere, answers of `qsun.generate`, and one line for what is wrong."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import qsun
from qsun.demo import base_directory
from qsun.tuning.examples import read_examples
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


def test_standard_input_of_other_bytes_is_one_line(cli, monkeypatch):
    for errors in ("strict", "surrogateescape"):  # as Python reads it in most locales, and in C
        stream = io.TextIOWrapper(io.BytesIO(b"calc \xff>"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stream)
        answer = cli("generate", "demo")
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert "is not valid" in answer.err


def test_prompts_come_through_a_pipe(cli, answers, pipe):
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS)
    whole = "".join(text + "\n" for text in answers)
    assert cli("generate", "demo", "--input", pipe(rows), "--max-tokens", 12).out == whole
    before = os.dup(0)
    try:
        os.dup2(int(Path(pipe(rows)).name), 0)
        assert cli("generate", "demo", "--input", "-", "--max-tokens", 12).out == whole
    finally:
        os.dup2(before, 0)
        os.close(before)


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


@pytest.mark.parametrize("name", ["lr=0.1", "a=b/c=d"])
def test_a_directory_may_have_an_equals_sign_in_its_path(cli, answers, name, tmp_path, monkeypatch):
    shutil.copytree(base_directory(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / name, name, f"sums={tmp_path / name}"):
        answer = cli("generate", "demo", PROMPTS[0], "--prefill", given, "--max-tokens", 12)
        assert answer.out == answers[0] + "\n", answer.err
    answer = cli("generate", "demo", PROMPTS[0], "--prefill", tmp_path / "lr=0.2")
    assert (answer.code, f"{tmp_path / 'lr=0.2'} is not a directory" in answer.err) == (2, True)


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


def test_tools_of_a_row_are_in_its_prompt_as_in_tuning(cli, talking_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(talking_model, model)
    (model / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}>{% endfor %}"
    )
    chat = {"messages": [{"role": "user", "content": "weather?"}], "tools": [{"name": "rain"}]}
    answered = chat | {"messages": [*chat["messages"], {"role": "assistant", "content": "call"}]}
    decode = qsun.load_decode(model, dtype="float32")
    (example,), _ = read_examples([str(write_jsonl(tmp_path / "data.jsonl", [answered]))], decode.tokenizer, 100)
    assert "rain" in decode.tokenizer.decode(example.prompt)
    tokens = qsun.generate(qsun.load_prefill(model, decode), decode, [example.prompt], max_new_tokens=8)[0]
    plain = {"messages": chat["messages"]}
    texts = {"prompt": "weather?", "tools": json.dumps(chat["tools"])}
    file = write_jsonl(tmp_path / "asked.jsonl", [chat, texts, plain])
    answer = cli("generate", model, "--input", file, "--chat", "--json", "--dtype", "float32", "--max-tokens", 8)
    found = [json.loads(line)["text"] for line in answer.out.splitlines()]
    assert found[0] == found[1] == decode.tokenizer.decode(tokens, skip_special_tokens=True) != found[2]


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
        (("x", "--temperature", 1, "--seed", 1 << 64), "seed 18446744073709551616 is out of range"),
        (("calc \udcff>",), "prompt 0 is not valid UTF-8"),
        (("x", "--stop", "\udcff"), "stop.0 '\\udcff' is invalid"),
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
        ({"messages": [{"role": "user", "content": "\ud800"}], "model": "a"}, "line 1: '\\ud800' is half of"),
        ({"messages": [], "tools": 3, "model": "a"}, "line 1: 'tools' is 3, not a list of function schemas"),
    ],
)
def test_a_bad_row_is_named(cli, tmp_path, row, says):
    file = write_jsonl(tmp_path / "prompts.jsonl", [row])
    answer = cli("generate", "demo", "--prefill", "a=demo", "--prefill", "b=demo", "--input", file)
    assert answer.code == 2
    assert says in answer.err
