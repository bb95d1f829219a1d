"""Chats as lm-eval asks for them, rendered as serving renders them."""

import logging
from collections.abc import Mapping
from typing import Any

from qsun.data.chat import chat_text
from qsun.errors import QsunError

log = logging.getLogger(__name__)


def harness_chat_text(
    tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool, template_args: Mapping[str, Any]
) -> str:
    """Render a prompt, which lm-eval ends with an open answer unless it asks for a generation prompt.

    A system message that the template refuses is left out, as lm-eval does.
    """
    ends: Any = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
    try:
        return chat_text(tokenizer, history, template_args=template_args, **ends)
    except QsunError:
        without = [message for message in history if message["role"] != "system"]
        if len(without) == len(history):
            raise
        log.warning("the chat template refuses the system message, which is left out")
        return chat_text(tokenizer, without, template_args=template_args, **ends)
