"""The embedded tasks: splits that share nothing, right responses, and scorers that recognize a wrong one."""

import ast
import json
import operator
import re
import subprocess
import sys

import pytest

from qsun.demo.corpus import is_held_out
from qsun.demo.tasks import GENERATORS, HARD_TASKS, SPLITS, TASKS, TaskExample, check, examples, split_of
from qsun.errors import QsunError

COUNT = 400
WORD = re.compile(r"[a-z]+")


def drawn(task: str, seed: int = 3) -> dict[str, list[TaskExample]]:
    return {split: examples(task, split, COUNT, seed) for split in SPLITS}


def keys_of(task: str, example: TaskExample) -> set[str]:
    """The sum, or the words, that decide an example's split, read from the finished text."""
    if task == "math":
        return {example.response.removeprefix("calc ").partition(">")[0]}
    if task == "code":
        return set(re.findall(r"'([a-z]+)'", example.prompt))
    call = json.loads(example.response)
    return {v for k, v in call["args"].items() if WORD.fullmatch(v) and k != "language"}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt_and_no_sum_or_word(task):
    splits = drawn(task)
    keys = {split: {key for e in found for key in keys_of(task, e)} for split, found in splits.items()}
    prompts = {split: {e.prompt for e in found} for split, found in splits.items()}
    for split in SPLITS:
        assert len(prompts[split]) == COUNT
        assert keys[split] and all(split_of(key) == split for key in keys[split])
        assert all(is_held_out(key) == (split != "train") for key in keys[split]), "the base never saw these"
        for other in set(SPLITS) - {split}:
            assert not prompts[split] & prompts[other] and not keys[split] & keys[other]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_the_examples(task):
    first, again, other = drawn(task), drawn(task), drawn(task, seed=4)
    assert first == again
    for split in SPLITS:
        assert first[split] != other[split]
    assert examples(task, "train", 10, 3) == first["train"][:10], "more examples begin with the same ones"


@pytest.mark.parametrize("task", TASKS + HARD_TASKS)
def test_the_tokenizer_represents_prompts_and_responses(task, demo_tokenizer):
    for example in drawn(task)["test"]:
        assert example.prompt.endswith(">") and ">" not in example.prompt[:-1]
        for text in (example.prompt, example.response):
            ids = demo_tokenizer(text, add_special_tokens=False)["input_ids"]
            assert min(ids) > 2 and demo_tokenizer.decode(ids) == text
        assert len(example.prompt + example.response) < 160


def test_math_is_right():
    sums = drawn("math")["train"]
    for example in sums:
        a, b = map(int, re.findall(r"\d+", example.prompt))
        asks_for_sum = re.search(r"gets|together|bag|came", example.prompt)
        expression, _, result = example.response.partition(">")
        assert int(result) == (operator.add if asks_for_sum else operator.sub)(a, b) >= 0
        assert expression == f"calc {a}{'+' if asks_for_sum else '-'}{b}"
    assert 0.3 < sum("+" in key for e in sums for key in keys_of("math", e)) / COUNT < 0.7


def test_hard_tasks_are_right_and_keep_the_splits():
    for split, found in drawn("equation").items():
        for example in found:
            left, _, right = example.response.partition("=")
            assert split_of(left) == split and eval(left, {}) == int(right)  # noqa: S307
    for split, found in drawn("shift").items():
        for example in found:
            word = example.prompt.rpartition(" ")[2].removesuffix(">")
            assert split_of(word) == split and len(word) == len(example.response)
            assert all((ord(b) - ord(a)) % 26 == 1 for a, b in zip(word, example.response, strict=True))
    assert set(HARD_TASKS).isdisjoint(TASKS)


def test_code_prints_what_python_prints():
    found = drawn("code")["test"]
    programs = [example.prompt.removesuffix(">") for example in found]
    for program in programs:
        ast.parse(program)
    joined = "\n".join(programs)
    done = subprocess.run([sys.executable, "-I", "-c", joined], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [example.response for example in found]
    operations = {re.sub(r"'[a-z]+'", "s", program.rpartition("print")[2]) for program in programs}
    assert len(operations) == 6 and {program.count("\n") for program in programs} == {0, 1}


def test_tool_calls_hold_the_words_of_the_wish():
    found = drawn("tool")["train"]
    tools: dict[str, set[tuple[str, ...]]] = {}
    for example in found:
        call = json.loads(example.response)
        assert list(call) == ["name", "args"] and json.dumps(call, separators=(",", ":")) == example.response
        tools.setdefault(call["name"], set()).add(tuple(call["args"]))
        for value in call["args"].values():
            assert re.search(rf"(?<![\w:]){re.escape(value)}(?![\w:])", example.prompt), example
    assert {name: len(signatures) for name, signatures in tools.items()} == dict.fromkeys(tools, 1)
    assert len(tools) == 6


@pytest.mark.parametrize(
    ("task", "response", "right", "wrong"),
    [
        (
            "math",
            "calc 12+8>20",
            ["calc 12+8>20", "20", " 20 ", "8+12> 20"],
            ["calc 12+8>21", "2", "", "20.", "twenty", "12+8>", "12+8"],
        ),
        ("equation", "12+8=20", ["12+8=20", "calc 12+8>20"], ["12+8=21", "12+8=", ""]),
        ("code", "tac", ["tac"], ["cat", "tac ", "'tac'", "Tac", ""]),
        (
            "tool",
            '{"name":"buy","args":{"count":"3","item":"ab"}}',
            [
                '{"name":"buy","args":{"count":"3","item":"ab"}}',
                '{"args": {"item": "ab", "count": "3"}, "name": "buy"}',
            ],
            [
                '{"name":"buy","args":{"count":3,"item":"ab"}}',
                '{"name":"buy","args":{"count":"3"}}',
                '{"name":"play","args":{"count":"3","item":"ab"}}',
                '{"name":"buy","args":{"count":"3","item":"ab","x":"y"}}',
                '{"name":"buy","args":{"count":"3","item":"ab"}',
                "",
                "[" * 100_000,
            ],
        ),
    ],
)
def test_scorers(task, response, right, wrong):
    example = TaskExample("p>", response)
    assert all(check(task, example, answer) for answer in right)
    assert not any(check(task, example, answer) for answer in wrong)


@pytest.mark.parametrize(
    ("task", "split", "count", "says"),
    [
        ("maths", "train", 1, r"task 'maths' is not known; use math, code, tool"),
        ("math", "held-out", 1, r"split 'held-out' is not known; use train, valid, test"),
        ("code", "test", 5, "task code has fewer than 5 different test examples; ask for 3"),
    ],
)
def test_what_cannot_be_drawn(task, split, count, says, monkeypatch):
    monkeypatch.setitem(GENERATORS, "code", lambda rng, _: TaskExample(f"{rng.randint(1, 3)}>", ""))
    with pytest.raises(QsunError, match=says):
        examples(task, split, count)


def test_the_command_writes_every_task_and_split(cli, tmp_path):
    answer = cli("demo-data", "-o", tmp_path / "data", "--count", 30, "--held-out", 20, "--seed", 5)
    assert answer.code == 0
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(
        f"{t}-{s}.jsonl" for t in TASKS for s in SPLITS
    )
    for task in TASKS:
        for split in SPLITS:
            lines = (tmp_path / f"data/{task}-{split}.jsonl").read_text().splitlines()
            rows = [TaskExample(**json.loads(line)) for line in lines]
            assert rows == examples(task, split, 30 if split == "train" else 20, 5)
    assert cli("demo-data", "-o", tmp_path / "data").code == 2, "a directory is never overwritten"
    assert cli("demo-data", "-o", tmp_path / "other", "--count", 0).code == 2


def test_quantize_reads_the_data_at_decode_positions(cli, tmp_path):
    assert cli("demo-data", "-o", tmp_path / "data", "--count", 8, "--held-out", 1).code == 0
    calib = tmp_path / "data/math-train.jsonl"
    answer = cli("quantize", "demo", "-o", tmp_path / "out", "--calib", calib, "--samples", 8, "--dry-run", "--json")
    rows = [json.loads(line) for line in calib.read_text().splitlines()]
    assert json.loads(answer.out)["calibration_tokens"] == sum(len(r["prompt"] + r["response"]) + 1 for r in rows)
