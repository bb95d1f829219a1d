"""Chat messages as text, through the model's own template."""

from typing import Any

from jinja2 import TemplateError

from qsun.data.jsonl import checked_text
from qsun.errors import QsunError


def assistant_turns(tokenizer: Any, messages: Any, where: str) -> list[int]:
    """Places of the assistant's messages that have something before them. Raises QsunError where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        raise QsunError(f"{where}: has chat messages, but the model's tokenizer has no chat template")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise QsunError(f"{where}: 'messages' is no list of objects with role and content")
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and i]
    if not turns:
        raise QsunError(f"{where}: messages need an assistant turn after a prompt")
    return turns


def render_turn(tokenizer: Any, messages: list[dict[str, Any]], turn: int, where: str) -> tuple[str, str]:
    """Text before the answer at `turn`, and text up to its end; usually, but not always, the one begins the other."""
    try:
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise QsunError(f"{where}: the model's chat template refuses these messages: {error}") from None
    return checked_text(prompt, where), checked_text(whole, where)


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Text of a conversation up to where the assistant's answer begins. Raises QsunError where the template refuses."""
    if not getattr(tokenizer, "chat_template", None):
        raise QsunError("the model's tokenizer has no chat template; use /v1/completions")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise QsunError(f"the model's chat template refuses these messages: {error}") from None
