"""Prompts: a text that is too long is refused after its beginning, and does not delay short ones."""

import asyncio
import threading

import pytest

from qsun.serve.api.prompts import PromptTokenizer
from qsun.serve.http.errors import HttpError


class Characters:
    """A token for each character; counts what it has read, and waits at a gate if there is one."""

    bos_token, chat_template = None, "{{ messages[0].content }}"

    def __init__(self):
        self.read, self.gate = 0, None

    def __call__(self, text, **_):
        if self.gate is not None and len(text) > 1000:
            self.gate.wait(20)
        self.read += len(text)
        return {"input_ids": [1] * len(text)}

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]


def test_a_text_that_cannot_fit_is_not_read_whole():
    tokenizer = Characters()
    with pytest.raises(HttpError, match="maximum context length is 100 tokens") as refused:
        asyncio.run(PromptTokenizer(tokenizer, 100).of_texts(["x" * 1_000_000]))
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert refused.value.param == "prompt"
    assert tokenizer.read <= 8 * 100


def test_a_long_text_of_few_tokens_is_read_whole():
    class Words(Characters):
        def __call__(self, text, **_):
            return {"input_ids": text.split("-")}

    (tokens,) = asyncio.run(PromptTokenizer(Words(), 100).of_texts(["x" * 5000 + "-y"]))
    assert len(tokens) == 2


def test_short_prompts_overtake_long_ones():
    tokenizer = Characters()
    tokenizer.gate = threading.Event()

    async def scenario():
        prompts = PromptTokenizer(tokenizer, 1 << 20)
        slow = [asyncio.ensure_future(prompts.of_texts(["x" * 20_000])) for _ in range(64)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            short = await prompts.of_texts(["abc"])
        assert not any(task.done() for task in slow)
        tokenizer.gate.set()
        return short, await asyncio.gather(*slow)

    short, long = asyncio.run(scenario())
    assert (short, len(long)) == ([[1] * 3], 64)
