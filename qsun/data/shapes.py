"""Shapes of rows: the ways in which public data sets write prompts and responses, converted to three of them.

Afterwards a row has `messages` in OpenAI's form (and `tools`), or `prompt` and `response`, or `text`.
"""

from collections.abc import Mapping
from typing import Any

from qsun.errors import QsunError

_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
)
_MORE_OF_THE_PROMPT = ("input", "context")  # of Alpaca and Dolly, after the instruction
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function_response", "observation"), "tool"),
}


class RowLeftOut(QsunError):
    """A row that cannot be used; it is skipped and counted."""


def recognize(row: Mapping[str, Any], where: str, needs_response: bool = True) -> tuple[Mapping[str, Any], str]:
    """Convert a row to `messages`, `prompt` and `response`, or `text`. Returns it with a note if it had other keys.

    needs_response: False: a row may have a prompt only; its `response` is then None.

    Raises:
        RowLeftOut: its value is null. QsunError: its keys are not known.
    """
    for key in _CHATS:
        if key in row:
            _check_present(row, key, where)
            if key == "messages":
                return row, ""
            return _as_chat(row, key, where), f"{key!r} is read as chat messages"
    for prompt, response in _PAIRS:
        if prompt in row and (response in row if needs_response else row.get(response) is not None):
            _check_present(row, prompt, where)
            _check_present(row, response, where)
            return _as_pair(row, prompt, response, where)
    alone = next((prompt for prompt, _ in _PAIRS if row.get(prompt) is not None), None)
    if alone is not None and not needs_response:
        whole, _ = _as_pair({**row, "response": None}, alone, "response", where)
        return whole, "" if alone == "prompt" else f"{alone!r} is read as a prompt without a response"
    if "text" in row:
        _check_present(row, "text", where)
        return row, ""
    raise QsunError(
        f"{where}: needs 'messages', or 'prompt' and 'response', or (for calibration) 'text'; it has "
        f"{', '.join(row) or 'nothing'}"
    )


def _check_present(row: Mapping[str, Any], key: str, where: str) -> None:
    if row[key] is None:
        raise RowLeftOut(f"{where}: {key!r} is null")


def _as_chat(row: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Read ShareGPT's "from" and "value" as role and content."""
    turns = row[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise QsunError(f"{where}: {key!r} is not a list of messages")
    messages = [_as_message(turn, where) for turn in turns]
    system = row.get("system")
    if isinstance(system, str) and system and messages and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {**row, "messages": messages}


def _as_message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    if "from" not in turn or "value" not in turn:
        return turn
    role = _ROLES.get(str(turn["from"]))
    if role is None:
        raise QsunError(f"{where}: a message is from {turn['from']!r:.40}; known are {', '.join(_ROLES)}")
    return {"role": role, "content": turn["value"]}


def _as_pair(row: Mapping[str, Any], prompt: str, response: str, where: str) -> tuple[dict[str, Any], str]:
    if isinstance(row[prompt], list) and isinstance(row[response], list):  # both as chat messages
        return {**row, "messages": row[prompt] + row[response]}, f"{prompt!r} and {response!r} are read as one chat"
    more = next((key for key in _MORE_OF_THE_PROMPT if prompt == "instruction" and key in row), "")
    whole = row[prompt]
    if more and row[more] and isinstance(row[more], str) and isinstance(whole, str):
        whole = f"{whole}\n\n{row[more]}"
    plain = {**row, "prompt": whole, "response": row[response]}
    if (prompt, response) == _PAIRS[0]:
        return plain, ""
    read = f"{prompt!r} and {more!r} are" if more else f"{prompt!r} is"
    return plain, f"{read} read as the prompt and {response!r} as the response, without the chat template"
