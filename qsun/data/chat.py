"""Chats as text and token ids, through the model's own template.

Tuning, calibration, evaluation and serving all render here, so that the same messages are the same tokens everywhere.
A template writes all special tokens itself: what it renders is tokenized without adding any.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from qsun.errors import QsunError, shortened

_DAY = date(2024, 7, 26)  # which Llama's templates write where they know no date
_CODES = (*"aAbBdmjyYHIMSpeFDTRxXcZz", *("-" + code for code in "dmjyHIMS"))
_FIXED_DAY = (  # hides a function of that name; transformers passes only data to a template
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{_DAY.strftime('%' + code)}')" for code in _CODES)
    + " }}{% endmacro %}\n"
)


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Return the token ids of a conversation, with the options of `chat_text`."""
    return rendered_tokens(tokenizer, chat_text(tokenizer, messages, **options))


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_args: Mapping[str, Any] | None = None,
    fixed_day: bool = False,
) -> str:
    """Render a conversation with the model's chat template.

    Args:
        messages: in OpenAI's form; content may be a list of text parts, and arguments of tool calls JSON text.
        tools: schemas of the functions that the model may call, in OpenAI's form.
        add_generation_prompt: end where the assistant's answer begins.
        continue_final_message: leave the last message open instead, for the model to continue.
        template_args: further variables of the template, such as enable_thinking. A name that is a parameter of
            apply_chat_template is that: `chat_template` replaces the template, which is a program.
        fixed_day: a template that writes today's date writes 26 July 2024, so that rows of data do not change.
    Raises:
        QsunError: no template, or one that refuses these messages or fails on them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise QsunError("the model's tokenizer has no chat template; give the prompt as text")
    try:
        template = tokenizer.get_chat_template(tools=tools) if fixed_day else ""
        dated = {"chat_template": _FIXED_DAY + template} if "strftime_now" in template else {}
        return tokenizer.apply_chat_template(
            [_as_templates_expect(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **(dated | dict(template_args or {})),
        )
    except Exception as error:  # a template is the model's own program, and may divide by zero
        reason = shortened(error, 300) or type(error).__name__
        raise QsunError(f"the model's chat template refuses these messages: {reason}") from None


def rendered_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokenize what a template rendered, or what follows a prompt: no special tokens are added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _as_templates_expect(message: Mapping[str, Any]) -> dict[str, Any]:
    """Join text parts to one string and parse arguments of tool calls, which OpenAI's API sends as JSON text."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, (list, tuple)):
        plain["content"] = "".join(_text_of_part(part) for part in content)
    calls = plain.get("tool_calls")
    if isinstance(calls, (list, tuple)):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return plain


def _text_of_part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"a content part is {part!r:.60}; only parts of type text are supported")


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = isinstance(function, Mapping) and function.get("arguments")
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except json.JSONDecodeError:
        return call  # the template prints the text as it is
    return {**call, "function": {**function, "arguments": parsed}}
