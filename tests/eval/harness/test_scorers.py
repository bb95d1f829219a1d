"""Scorers: what counts as the same answer."""

import pytest

from qsun.errors import QsunError
from qsun.eval.harness.scorers import find_scorer


@pytest.mark.parametrize(
    ("scorer", "answer", "response", "right"),
    [
        ("exact", " x  =\n1 ", "x = 1", True),
        ("exact", "x=1", "x = 1", False),
        ("json", '{"b": [1, 2], "a": "x"}', '{"a":"x","b":[1,2]}', True),
        ("json", '{"a": 1}', '{"a": 2}', False),
        ("json", "{oops", '{"a": 2}', False),
        ("json", "[" * 100_000, "[]", False),
        ("json", '{"on": 1}', '{"on": true}', False),
        ("json", "[0]", "[false]", False),
        ("json", '{"on": [true, null]}', '{"on": [true, null]}', True),
        ("json", '{"n": 1.0}', '{"n": 1}', True),
        ("json", '{"a": 1, "b": 2}', '{"a": 1}', False),
        ("json", "[1, 2]", "[1]", False),
        ("expression", "- number0 number1", "-  number0   number1", True),
        ("expression", "- number1 number0", "- number0 number1", False),
        ("expression", "+ number1 number0", "+ number0 number1", True),
        ("expression", "number0 - number1", "- number0 number1", True),
        ("expression", "* + a b 2", "2 * (a + b)", True),
        ("expression", "/ a b", "a / b", True),
        ("expression", "8 - 3.0", "5", True),
        ("expression", "-5", "3 - 8", True),
        ("expression", "a", "b", False),
        ("expression", "/ 1 0", "1", False),
        ("expression", "- number0", "- number0", True),
        ("expression", "+ a b c", "+ a b", False),
        ("expression", "9 ** 9 ** 9", "1", False),
        ("expression", "__import__('os').getpid()", "1", False),
        ("expression", "1e999999999", "1e999999999", False),
        ("expression", "1 + 1e-999999999", "1", True),
        ("expression", "* a 12.", "* a 12.0", False),
        ("expression", "(" * 5000, "1", False),
        ("expression", "", "1", False),
        ("expression", "- 3 + 4", "1", True),
        ("expression", "- ( a + b )", "-a - b", True),
        ("expression", "+ 3 - 4", "-1", True),
        ("expression", "007 + 1", "8", True),
        ("expression", "* 007 1", "7.007 - .007", True),
        ("expression", "1_000 + 0x10", "1016.", True),
        ("expression", "x - -0.00005", "x + 5e-5", True),
        ("expression", "0.00001", "0.00002", False),
        ("expression", "100000000000000000.0", "1e17", True),
        ("expression", "100000000000000001.0", "1e17", False),
    ],
)
def test_what_is_equal(scorer, answer, response, right):
    assert find_scorer(scorer)(answer, response) is right


@pytest.mark.parametrize(
    "text", ["0.00005 * a", "0.00001", "1" + 20 * "0" + ".0", "1" + 20 * "0", "1e3", "007 + 1", "- 3 + 4", "(a\n+ 1)"]
)
def test_an_expression_equals_itself(text):
    assert find_scorer("expression")(text, text)


def test_an_entry_point_and_what_is_none():
    assert find_scorer("operator:eq")("a", "a")
    for name in ("bleu", "no_such_module:f", "json:no_such_function", "math:pi", ":"):
        with pytest.raises(QsunError, match="scorer"):
            find_scorer(name)
