"""Tool calls in every format, whole and cut at any place."""

import json

import pytest
from fastapi.responses import JSONResponse

from qsun.errors import QsunError
from qsun.serve.api.tools.formats import FORCED, HERMES, LLAMA3, MISTRAL, format_of
from qsun.serve.api.tools.parser import ToolParser

ONE = '{"name": "add", "arguments": {"a": 1, "b": "x}<"}}'
TWO = '{"name": "now", "arguments": {}}'
A, B = ("add", {"a": 1, "b": "x}<"}), ("now", {})

UNSENDABLE = [
    '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": [-1e999]}}</tool_call>',
    '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
]  # what would be no JSON, or no UTF-8, as a call

ANSWERS = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [A]),
    (HERMES, f"Let me see.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>{TWO}</tool_call>", "Let me see.", [A, B]),
    (HERMES, f"<tool_call>{ONE}", "", [A]),  # the end token came before the closing tag
    (HERMES, "1 < 2 <tool", "1 < 2 <tool", []),
    (HERMES, "<tool_call>{bad</tool_call> so", "<tool_call>{bad</tool_call> so", []),
    (HERMES, ONE, ONE, []),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {TWO}]", "", [A, B]),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x}<"}[TOOL_CALLS]now{}', "", [A, B]),
    (MISTRAL, "[TOOL] no", "[TOOL] no", []),
    (MISTRAL, "[TOOL_CALLS] no", "[TOOL_CALLS] no", []),
    (LLAMA3, ONE.replace("arguments", "parameters"), "", [A]),
    (LLAMA3, f"<|python_tag|>{ONE}; {TWO}", "", [A, B]),
    (LLAMA3, '{"answer": 5}', '{"answer": 5}', []),
    (LLAMA3, f"It is {ONE}", f"It is {ONE}", []),
    (LLAMA3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (FORCED, ONE, "", [A]),
    *((HERMES, text, text, []) for text in UNSENDABLE),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": Infinity}', '[TOOL_CALLS]add[ARGS]{"a": Infinity}', []),
    (LLAMA3, '{"name": "add", "parameters": {"a": NaN}}', '{"name": "add", "parameters": {"a": NaN}}', []),
    (HERMES, '<tool_call>{"name": "say", "arguments": {"to": "ok \\ud83d"}}</tool_call>', "",
     [("say", {"to": "ok \ud83d"})]),
    (HERMES, '<tool_call>{"name": "say", "arguments": {"to": "\\ud83d\\ude00 Köln"}}</tool_call>', "",
     [("say", {"to": "😀 Köln"})]),
]  # fmt: skip


def read(form, pieces, most=None):
    parser, content, calls = ToolParser(form, most), "", []
    for number, piece in enumerate(pieces):
        text, found = parser.feed(piece, number == len(pieces) - 1)
        content += text
        calls += found
    assert len({call.id for call in calls}) == len(calls)
    JSONResponse([content, *(call.as_json() for call in calls)])  # it can be sent
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS, ids=lambda v: getattr(v, "name", str(v)[:30]))
def test_calls_and_content(form, text, content, calls):
    assert read(form, [text]) == (content, calls)
    assert read(form, [*text, ""]) == (content, calls)
    for cut in range(len(text)):
        assert read(form, [text[:cut], text[cut:]]) == (content, calls)


def test_arguments_are_readable_where_they_can_be():
    _, (call,) = ToolParser(FORCED).feed('{"name": "say", "arguments": {"to": "K\\u00f6ln"}}', last=True)
    assert call.arguments == '{"to": "Köln"}'


def test_plain_text_is_not_held_back():
    for form in (HERMES, MISTRAL, LLAMA3):
        parser = ToolParser(form)
        assert parser.feed("Hello") == ("Hello", [])
        assert parser.feed(" world <") == (" world" if form is HERMES else " world <", [])
        assert parser.feed(" \n", last=True) == (" < \n" if form is HERMES else " \n", [])


def test_a_client_that_takes_one_call_gets_one():
    assert read(HERMES, [f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call>"], 1) == ("", [A])


def test_the_format_is_the_templates():
    assert format_of("{% for t in tools %}<tool_call>") is HERMES
    assert format_of("[AVAILABLE_TOOLS]{{ tools }} [TOOL_CALLS]") is MISTRAL
    assert format_of("{{ tools }} Environment: ipython") is LLAMA3
    assert format_of("{{ tools }}") is HERMES
    for template in (None, "", "{{ messages }}"):
        with pytest.raises(QsunError, match="does not support tools"):
            format_of(template)
