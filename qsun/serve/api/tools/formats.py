"""How models write calls of tools: the formats of Hermes (Qwen and others), Llama 3 JSON, and Mistral.

A format is data: what opens a call, what closes it, and how the text between is read.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qsun.errors import QsunError

_Called = tuple[str, str]  # a function's name, and its arguments as a JSON object in a string
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolFormat:
    """Attributes:
    opens: what begins a call. at_start: only at the start of an answer.
    closes: what ends a call; "": the end of the answer.
    read: the calls in the text between; None where it is not one.
    keeps_opening: the opening is part of that text.
    special: special tokens are part of the format, so they must be part of the text.
    marks: what in a chat template shows the format.
    """

    name: str
    opens: tuple[str, ...]
    closes: str
    read: Callable[[str], list[_Called] | None]
    marks: tuple[str, ...]
    at_start: bool = False
    keeps_opening: bool = False
    special: bool = False


def _call(value: Any) -> _Called | None:
    """Read {"name": ..., "arguments" or "parameters": ...}; None for anything else, and for what JSON cannot hold."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or _is_broken(value["name"]):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        return value["name"], json.dumps(arguments) if _is_broken(text) else text
    except (ValueError, RecursionError):  # NaN and infinities, which Python reads
        return None


def _is_broken(text: str) -> bool:
    """Return whether it has half a character, such as "\\ud83d": valid as an escape, but not in UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(values: Any) -> list[_Called] | None:
    """Read calls; None where there is none, or one is not a call."""
    values = values if isinstance(values, list) else [values]
    calls = [_call(value) for value in values]
    return [call for call in calls if call is not None] if values and None not in calls else None


def read_json(text: str) -> list[_Called] | None:
    """Read one call or a list of calls."""
    return _calls(_parsed(text))


def read_llama(text: str) -> list[_Called] | None:
    """Read JSON objects with ; or spaces between them."""
    values, rest = [], text.removeprefix("<|python_tag|>").strip()
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        rest = rest[end:].lstrip("; \n")
    return _calls(values)


def read_mistral(text: str) -> list[_Called] | None:
    """Read [{...}, ...], or since version 11 name[ARGS]{...} or name{...}, again after each [TOOL_CALLS]."""
    calls: list[_Called] = []
    for part in text.split("[TOOL_CALLS]"):
        name, brace, rest = part.strip().partition("{")
        found = read_json(part)
        if brace and not found and "[{" not in part:
            found = _calls({"name": name.replace("[ARGS]", "").strip(), "arguments": _parsed(brace + rest)})
        if not found:
            return None
        calls += found
    return calls


HERMES = ToolFormat("hermes", ("<tool_call>",), "</tool_call>", read_json, ("<tool_call>",))
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), "", read_mistral, ("[TOOL_CALLS]",), special=True)
LLAMA3 = ToolFormat(
    "llama3",
    ("<|python_tag|>", "{"),
    "",
    read_llama,
    ("<|python_tag|>", '{"name": function name, "parameters"', "Environment: ipython"),
    at_start=True,
    keeps_opening=True,
    special=True,
)
FORCED = ToolFormat("forced", ("{",), "", read_json, (), at_start=True, keeps_opening=True)  # by a constraint
FORMATS = {one.name: one for one in (HERMES, MISTRAL, LLAMA3)}


def format_of(chat_template: str | None) -> ToolFormat:
    """Return the format that a chat template teaches its model. Raises QsunError for one without tools."""
    template = chat_template or ""
    if "tools" not in template:
        raise QsunError("the model's chat template does not support tools; leave tools out, or use another model")
    return next((one for one in FORMATS.values() if any(mark in template for mark in one.marks)), HERMES)
