"""Function calls: what parses, and which calls are the expected ones."""

import json

import pytest

from qsun.eval.tasks.bfcl import FunctionCall, check_answer, parse_calls, prompt_of


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [("f", {"a": 1})]),
        ('{"name": "f", "arguments": {}}', [("f", {})]),
        (
            ' \n```json\n[{"name": "a.b", "arguments": {"x": [1, {"y": null}]}}]\n```\nDone.',
            [("a.b", {"x": [1, {"y": None}]})],
        ),
        ('f(a=1), g.h(b="x, y", c=[1, -2.5], d={"k": (1, True)})', None),
        ("[f(a=1), f(a=2)]", [("f", {"a": 1}), ("f", {"a": 2})]),
        ("```python\nf(a='b')\n```", [("f", {"a": "b"})]),
        ("[]", []),
    ],
)
def test_calls(answer, calls):
    if calls is None:
        calls = [("f", {"a": 1}), ("g.h", {"b": "x, y", "c": [1, -2.5], "d": {"k": (1, True)}})]
    assert parse_calls(answer) == [FunctionCall(*one) for one in calls]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I would call f(a=1).",
        "f",
        "f(1)",
        "f(a=1, a=2)",
        "f(**{'a': 1})",
        "f(*[1])",
        "f(a=open('x'))",
        "f(a=b)",
        "f()()",
        "(lambda: 0)(a=1)",
        "f(a=1); g()",
        "x = f(a=1)",
        '[{"name": "f"}]',
        '[{"name": "f", "arguments": [1]}]',
        '[{"name": 1, "arguments": {}}]',
        '"text"',
        "1",
        "[[f(a=1)]]",
        "(" * 5000,
        "[" * 100_000,
        "f(a=" + "-" * 100_000 + "1)",
        "f(a='\\d\x00')",
    ],
)
def test_what_is_no_call(answer):
    assert parse_calls(answer) is None


def test_python_is_parsed_and_not_run(tmp_path):
    assert parse_calls(f"f(a=open({str(tmp_path / 'x')!r}, 'w'))") is None
    assert not list(tmp_path.iterdir())


TRUTH = [
    {
        "f": {
            "a": [1, 2],
            "s": ["New York, NY", "NYC"],
            "o": ["", True],
            "n": [[1.0, 2.0]],
            "d": [{"x": ["p"], "y": ["", 3]}],
        }
    }
]
RIGHT = {"a": 1, "s": "NYC", "n": [1, 2], "d": {"x": "p"}}


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, True),
        ({"a": 2.0}, True),
        ({"a": 3}, False),
        ({"a": "1"}, False),
        ({"a": True}, False),  # which Python calls equal to 1
        ({"a": None}, False),
        ({"s": "new york ny"}, True),
        ({"s": "N.Y.C."}, True),
        ({"s": "New Jersey"}, False),
        ({"s": ["NYC"]}, False),
        ({"o": True}, True),
        ({"o": False}, False),
        ({"o": 1}, False),
        ({"n": [1.0, 2.0]}, True),
        ({"n": [2, 1]}, False),
        ({"n": [1]}, False),
        ({"n": 1}, False),
        ({"d": {"x": "P", "y": 3}}, True),
        ({"d": {"x": "p", "y": 4}}, False),
        ({"d": {"y": 3}}, False),
        ({"d": {"x": "p", "z": 1}}, False),
        ({"d": "p"}, False),
        ({"extra": 1}, False),
        ({"a": ...}, False),  # left out
        ({"d": ...}, False),
    ],
    ids=str,
)
def test_one_call(changes, right):
    arguments = {key: value for key, value in (RIGHT | changes).items() if value is not ...}
    assert check_answer(json.dumps([{"name": "f", "arguments": arguments}]), TRUTH) is right
    if right:
        assert check_answer(f"f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})", TRUTH)
        assert not check_answer(json.dumps([{"name": "g", "arguments": arguments}]), TRUTH)


PARALLEL = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}, {"g": {}}]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("f(a=2), f(a=1), g()", True),
        ("g(), f(a=1), f(a=2)", True),  # the first expected call must leave a=1 to the second
        ("f(a=1), f(a=1), g()", True),
        ("f(a=2), f(a=2), g()", False),
        ("f(a=1), g()", False),
        ("f(a=1), f(a=2), g(), g()", False),
        ("f(a=1), g(), g()", False),
        ("", False),
    ],
)
def test_parallel_calls(answer, right):
    assert check_answer(answer, PARALLEL) is right


def test_the_prompt_lists_functions_and_question():
    functions = [{"name": "f", "parameters": {"type": "dict"}}, {"name": "g"}]
    prompt = prompt_of("What is 1?", functions)
    assert all(json.dumps(function) in prompt for function in functions)
    assert prompt.index("Question: What is 1?") < prompt.index('[{"name"')
