"""From bodies to tokens of prompts, without work on texts that cannot fit."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qsun.data.chat import chat_text, rendered_tokens
from qsun.errors import QsunError
from qsun.model.locate import encode
from qsun.serve.api.bodies.chat import Conversation
from qsun.serve.http.errors import HttpError

_LONG_CHARACTERS = 1 << 14
_CHARACTERS_OF_A_TOKEN = 8  # more than of any usual text; a longer one is judged by its beginning first
_CUT_TOKENS = 64  # by how many tokens the beginning may be shorter inside the whole text, because of the cut


def context_exceeded(positions: int, prompt: str, asked: int = 0, param: str | None = None) -> HttpError:
    """Return a 400 in the words and with the code that clients look for. prompt: its length, in words."""
    wanted = f"{prompt} in the prompt" + (f" and {asked} in the answer" if asked else "")
    message = f"this model's maximum context length is {positions} tokens, and the request has {wanted}"
    return HttpError(400, f"{message}; ask for fewer, or shorten the prompt", param, code="context_length_exceeded")


class PromptTokenizer:
    """Tokenizes prompts. Long ones take turns in a thread of their own, so that short ones need not wait for them.

    Args:
        tokenizer: of the decode module; None where it has none. positions: of the model.
    """

    def __init__(self, tokenizer: Any | None, positions: int):
        self.tokenizer, self.positions = tokenizer, positions
        self._long = ThreadPoolExecutor(1, "qsun-long-prompts")

    async def of_texts(self, prompts: list[str] | list[list[int]], special: bool = True) -> list[list[int]]:
        """Return the tokens of prompts that are text or tokens already. Raises HttpError 400 for what cannot fit."""
        characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self._run(characters, lambda: [self._tokens(prompt, special) for prompt in prompts])

    async def of_conversation(self, body: Conversation) -> list[int]:
        """Return the tokens of a conversation up to where the answer begins."""
        messages = [message.plain() for message in body.messages]
        characters = sum(len(part.text) for message in body.messages for part in message.content)
        arguments = body.template_arguments()

        def render() -> list[int]:
            text = chat_text(self.tokenizer, messages, **arguments)
            return self._within(text, lambda text: rendered_tokens(self.tokenizer, text), "messages")

        return await self._run(characters, render)

    async def _run(self, characters: int, work: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._long if characters > _LONG_CHARACTERS else None, work)

    def _tokens(self, prompt: str | list[int], special: bool) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise QsunError("the model has no tokenizer; give prompts as token ids")
        tokenize = encode if special else rendered_tokens
        return self._within(prompt, lambda text: tokenize(self.tokenizer, text), "prompt")

    def _within(self, text: str, tokenize: Callable[[str], list[int]], param: str) -> list[int]:
        """Tokenize a text, but not all of it where its beginning is too long already."""
        beginning = text[: _CHARACTERS_OF_A_TOKEN * self.positions]
        if len(beginning) < len(text):
            least = len(tokenize(beginning)) - _CUT_TOKENS
            if least > self.positions:
                raise context_exceeded(self.positions, f"at least {least}", param=param)
        return tokenize(text)
