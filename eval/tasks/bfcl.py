"""Prompts and checks of the Berkeley Function Calling Leaderboard (BFCL).

Source: Gorilla, berkeley-function-call-leaderboard, ast_checker, version 4: calls are parsed and compared with lists of
acceptable values. Here equal ints and floats are equal, and type declarations are ignored.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FENCE = re.compile(r"```\w*\n?(.*?)```", re.DOTALL)
_IGNORED = re.compile(r"[ ,./\-_*^]")
_ABSENT = ""  # among acceptable values: the parameter may be left out


@dataclass(frozen=True)
class FunctionCall:
    """A function's name and its arguments."""

    name: str
    arguments: Mapping[str, Any]


def prompt_of(question: str, functions: Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt with the functions as JSON, the question, and the wanted form of the answer."""
    listed = "\n".join(json.dumps(function) for function in functions)
    return (
        f"You can call these functions:\n{listed}\n\nQuestion: {question}\n\n"
        'Answer with the calls only, as a JSON list: [{"name": "...", "arguments": {"...": ...}}]\nAnswer:'
    )


def parse_calls(answer: str) -> list[FunctionCall] | None:
    """Parse a JSON list (or one object) of {"name", "arguments"}, or Python calls `f(a=1), g(b="x")`.

    If there is a code fence, only the text in the first one counts. Python is never run: arguments must be literals
    with names.

    Returns:
        None for anything else.
    """
    fenced = _FENCE.search(answer)
    text = (fenced[1] if fenced else answer).strip()
    try:
        return _from_json(json.loads(text))
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning for what models write
            return list(_from_python(text)) if text else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _from_json(value: Any) -> list[FunctionCall] | None:
    rows = value if isinstance(value, list) else [value]
    calls = []
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"name", "arguments"}:
            return None
        if not isinstance(row["name"], str) or not isinstance(row["arguments"], dict):
            return None
        calls.append(FunctionCall(row["name"], row["arguments"]))
    return calls


def _from_python(text: str) -> Iterator[FunctionCall]:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    tree = ast.parse(f"[{inner}\n]", mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("not a list of calls")
    for node in tree.elts:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("not a call with named arguments")
        names = [keyword.arg for keyword in node.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError("arguments without a name, or twice")
        yield FunctionCall(_dotted(node.func), {str(k.arg): ast.literal_eval(k.value) for k in node.keywords})


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("not the name of a function")


def check_answer(answer: str, truth: Sequence[Mapping[str, Mapping[str, Any]]]) -> bool:
    """Return whether an answer makes the expected calls, each once, in any order.

    Args:
        truth: [{name: {parameter: [acceptable values]}}], as in BFCL's possible_answer.
    """
    calls = parse_calls(answer)
    if calls is None or len(calls) != len(truth):
        return False
    fits = [[_fits(call, expected) for call in calls] for expected in truth]
    return _all_matched(fits)


def _all_matched(fits: Sequence[Sequence[bool]]) -> bool:
    """Return whether each row can be matched with a different true column (augmenting paths)."""
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, good in enumerate(fits[row]):
            if good and column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))


def _fits(call: FunctionCall, expected: Mapping[str, Mapping[str, Any]]) -> bool:
    ((name, parameters),) = expected.items()
    return call.name == name and _fields_fit(call.arguments, parameters)


def _fields_fit(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Return whether every given value is acceptable and every missing one optional."""
    return set(values) <= set(parameters) and all(
        any(_equal(values[key], option) for option in _options(acceptable))
        if key in values
        else _ABSENT in _options(acceptable)
        for key, acceptable in parameters.items()
    )


def _options(acceptable: Any) -> list[Any]:
    return acceptable if isinstance(acceptable, list) else [acceptable]


def _equal(value: Any, option: Any) -> bool:
    """Compare a value with an acceptable one, whose nested dicts hold lists of acceptable values again."""
    if isinstance(option, Mapping):
        return isinstance(value, Mapping) and _fields_fit(value, option)
    if isinstance(option, (list, tuple)):
        alike = isinstance(value, (list, tuple)) and len(value) == len(option)
        return alike and all(map(_equal, value, option))
    if isinstance(option, str):
        return isinstance(value, str) and _plain(value) == _plain(option)
    if isinstance(option, bool) or isinstance(value, bool) or option is None:
        return value is option
    return isinstance(value, (int, float)) and bool(value == option)


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')
