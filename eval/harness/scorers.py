"""Scorers: whether an answer is right, given the response of the data."""

import ast
import importlib
import operator
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from math import isfinite

from qsun.demo.tasks import json_equal
from qsun.errors import QsunError

Scorer = Callable[[str, str], bool]  # answer, right response
_OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_LEADING_ZEROS = re.compile(r"(?<![\w.])0+(?=\d)")
_NODES: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def exact(answer: str, response: str) -> bool:
    """Compare texts, in which any white space counts as one blank."""
    return answer.split() == response.split()


def expression_equal(answer: str, response: str) -> bool:
    """Compare arithmetic over numbers and names, `(a + 2) * b` or in prefix form `* + a 2 b`, by value.

    Names get fixed values at which expressions that differ practically never agree.
    """
    try:
        return _value(answer) == _value(response)
    except (ValueError, ZeroDivisionError, SyntaxError, RecursionError, MemoryError):
        return False


def _value(text: str) -> Fraction:
    words = text.split()
    if words and words[0] in _OPERATORS and len(words) > 2:
        with suppress(ValueError):  # `- 3 + 4` is infix
            return _prefix_value(words)
    plain = _LEADING_ZEROS.sub("", text.strip())  # Python refuses 007
    return _infix(ast.parse(plain, mode="eval").body, plain)


def _prefix_value(words: Iterable[str]) -> Fraction:
    rest = iter(words)
    value = _prefix(rest)
    if next(rest, None) is not None:
        raise ValueError("more than one expression")
    return value


def _prefix(words: Iterator[str]) -> Fraction:
    word = next(words, "")
    if word in _OPERATORS:
        left = _prefix(words)
        return _OPERATORS[word](left, _prefix(words))
    return _operand(word)


def _infix(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _NODES:
        return _OPERATORS[_NODES[type(node.op)]](_infix(node.left, text), _infix(node.right, text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _infix(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Name):
        return _operand(node.id)
    if isinstance(node, ast.Constant):
        return _constant(node.value, (ast.get_source_segment(text, node) or "").replace("_", ""))
    raise ValueError("not arithmetic")


def _constant(value: object, text: str) -> Fraction:
    if isinstance(value, bool):
        return _operand(str(value))
    if isinstance(value, int):
        return Fraction(value)
    if isinstance(value, float) and isfinite(value):  # and 1e-999999999 is 0: as a Fraction it is too much work
        return Fraction(text) if value else Fraction(0)
    raise ValueError("not a number")


def _operand(word: str) -> Fraction:
    if word.isidentifier():
        return Fraction(zlib.crc32(word.encode()) + 2, 997)
    if not re.fullmatch(r"-?\d{1,99}(\.\d{1,99})?", word):
        raise ValueError("not a number")
    return Fraction(word)


SCORERS: dict[str, Scorer] = {"exact": exact, "json": json_equal, "expression": expression_equal}


def find_scorer(name: str) -> Scorer:
    """Return a scorer by its name, or the function of an entry point `module:function`.

    Raises:
        QsunError: neither of them.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise QsunError(f"scorer {name!r} is not known; use {', '.join(SCORERS)} or module:function")
    try:
        found: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise QsunError(f"scorer {name!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from None
    if not callable(found):
        raise QsunError(f"scorer {name!r} is not a function of an answer and the right response")
    return found
