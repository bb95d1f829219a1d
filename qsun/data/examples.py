"""A prompt and its response as tokens, from a row of prompt and response or from a turn of a chat."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qsun.data.chat import chat_text, rendered_tokens
from qsun.data.jsonl import check_text, text_of
from qsun.data.shapes import RowLeftOut
from qsun.errors import QsunError
from qsun.model.locate import encode


@dataclass(frozen=True)
class TokenExample:
    """Token ids; the response ends with the model's EOS token if it has one, and is empty if a teacher is to answer."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def pair_example(tokenizer: Any, row: Mapping[str, Any], where: str) -> TokenExample:
    """Tokenize a row of prompt and response. Raises RowLeftOut if one of them has no tokens."""
    prompt = encode(tokenizer, text_of(row, "prompt", where))
    return _example(tokenizer, prompt, rendered_tokens(tokenizer, text_of(row, "response", where)), where)


def prompt_example(tokenizer: Any, row: Mapping[str, Any], where: str, fixed_day: bool = False) -> TokenExample:
    """Tokenize a prompt, or a chat whose last message waits for an answer; the response is empty."""
    if "messages" in row:
        try:
            text = chat_text(tokenizer, row["messages"], tools=tools_of(row, where), fixed_day=fixed_day)
        except QsunError as error:
            raise QsunError(f"{where}: {error}") from None
        check_text(text, where)
        prompt = rendered_tokens(tokenizer, text)
    else:
        prompt = encode(tokenizer, text_of(row, "prompt", where))
    if not prompt:
        raise RowLeftOut(f"{where}: the prompt has no tokens")
    return TokenExample(tuple(prompt), ())


def assistant_turns(row: Mapping[str, Any], where: str) -> list[int]:
    """Return the places of the assistant's messages after a prompt, without empty ones. Raises RowLeftOut for none."""
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise QsunError(f"{where}: 'messages' is not a list of objects with role and content")
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and i]
    if not turns:
        raise RowLeftOut(f"{where}: messages need an assistant turn after a prompt")
    turns = [turn for turn in turns if not _is_empty(messages[turn])]
    if not turns:
        raise RowLeftOut(f"{where}: the assistant's turn has no text")
    return turns


def turn_example(tokenizer: Any, row: Mapping[str, Any], turn: int, where: str) -> TokenExample | None:
    """Render the answer at `turn` and all that stands before it, its prompt.

    Returns None if the template renders the prompt differently once it is answered.

    Raises:
        RowLeftOut: the template does not write the answer's tool calls. QsunError: it refuses the messages.
    """
    messages = row["messages"]
    options: Any = {"tools": tools_of(row, where), "fixed_day": True}
    try:
        prompt = chat_text(tokenizer, messages[:turn], **options)
        whole = chat_text(tokenizer, messages[: turn + 1], **options, add_generation_prompt=False)
    except QsunError as error:
        raise QsunError(f"{where}: {error}") from None
    check_text(whole, where)
    if not whole.startswith(prompt):
        return None
    answer = whole[len(prompt) :]
    lost = next((name for name in _called(messages[turn]) if name not in answer), None)
    if lost is not None:
        raise RowLeftOut(
            f"{where}: the model's chat template does not write tool calls: that of {lost!r} is missing from message "
            f"{turn}; give the calls as text in 'content', or use a model whose template writes them"
        )
    return _example(tokenizer, rendered_tokens(tokenizer, prompt), rendered_tokens(tokenizer, answer), where)


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a message has neither text nor anything beside it that a template may write."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text", part) if isinstance(part, Mapping) else part for part in parts]
    beside = any(value for key, value in message.items() if key not in ("role", "content"))
    return not beside and not any(text is not None and str(text).strip() for text in texts)


def _called(message: Mapping[str, Any]) -> list[str]:
    """Return the names of the functions that a message calls, in OpenAI's form or without its `function`."""
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, (list, tuple)) else ()
    called = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    return [str(function["name"]) for function in called if isinstance(function, Mapping) and function.get("name")]


def tools_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """Return the schemas in a row's `tools`, a list or JSON text of one; None if there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with suppress(json.JSONDecodeError):
            tools = json.loads(tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise QsunError(f"{where}: 'tools' is {tools!r:.40}, not a list of function schemas")
    return tools or None


def _example(tokenizer: Any, prompt: list[int], response: list[int], where: str) -> TokenExample:
    if not prompt or not response:
        raise RowLeftOut(f"{where}: the {'response' if prompt else 'prompt'} has no tokens")
    end = tokenizer.eos_token_id
    if end is not None and end in response:
        response = response[: len(response) - response[::-1].index(end)]  # a template may add more after it
    elif end is not None:
        response = [*response, end]
    return TokenExample(tuple(prompt), tuple(response))


def check_vocabulary(sequences: Iterable[Sequence[int]], vocab_size: int, tokenizer: Any, what: str) -> None:
    """Raise QsunError for a token that the model has no embedding of. Sequences are not empty."""
    for tokens in sequences:
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            text = tokenizer.convert_ids_to_tokens(bad) if tokenizer is not None and bad >= 0 else None
            named = f"{bad} ({text!r:.40})" if text else str(bad)
            raise QsunError(
                f"{what} has token {named}, outside the model's vocabulary of {vocab_size}; use the tokenizer that the "
                "model was made with"
            )
