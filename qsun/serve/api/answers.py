"""Answers in OpenAI's words: whole ones, and the chunks of a stream, for completions and for chats."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qsun.engine.requests import TokenLogprob, Update
from qsun.serve.api.token_text import Spelling

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    prompt_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""
    cached_tokens: int = 0
    offsets: list[int] = field(default_factory=list)  # of each token: the text that was there before it

    def take(self, update: Update) -> None:
        self.offsets += [len(self.text)] * len(update.tokens)
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.finish = update.finish
        self.cached_tokens += update.cached_tokens


class Answer:
    """Builds the JSON of one request's answer.

    Args:
        chat: a chat's words, or a completion's. prompts: tokens of each prompt; its n choices share it.
        token_ids: the tokens are asked for too.
    """

    def __init__(self, chat: bool, model: str, prompts: Sequence[int], n: int, spelling: Spelling, token_ids: bool):
        self.chat, self.spelling, self.token_ids, self._n = chat, spelling, token_ids, n
        self.choices = [Choice(i * n + j, length) for i, length in enumerate(prompts) for j in range(n)]
        prefix, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}

    def whole(self) -> dict[str, Any]:
        return self.head | {"choices": [self._choice(choice) for choice in self.choices], "usage": self.usage()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {"index": choice.index}
        if self.chat:
            body["message"] = {"role": "assistant", "content": choice.text}
        else:
            body["text"] = choice.text
        body["logprobs"] = self._logprobs(choice.logprobs, choice.offsets)
        body["finish_reason"] = _REASONS.get(choice.finish)
        return body | ({"token_ids": choice.tokens} if self.token_ids else {})

    def usage(self) -> dict[str, Any]:
        n = self._n
        prompt = sum(choice.prompt_tokens for choice in self.choices[::n])  # n choices share one prompt
        completion = sum(len(choice.tokens) for choice in self.choices)
        cached = sum(max(c.cached_tokens for c in self.choices[i : i + n]) for i in range(0, len(self.choices), n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # --- streams ------------------------------------------------------------------------------------------------------

    def opening(self) -> list[bytes]:
        """A chat's stream begins with the role of each choice."""
        if not self.chat:
            return []
        return [self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}) for choice in self.choices]

    def chunk(self, choice: Choice, update: Update) -> bytes | None:
        """What an update, already taken, adds for the client to see; None for nothing yet."""
        if not (update.text or update.finish or update.logprobs or self.token_ids):
            return None
        body: dict[str, Any] = {"delta": {"content": update.text} if update.text else {}}
        if not self.chat:
            body = {"text": update.text}
        logprobs = self._logprobs(update.logprobs, choice.offsets[len(choice.offsets) - len(update.tokens) :])
        if self.token_ids:
            body["token_ids"] = list(update.tokens)
        return self._chunk(choice, body, logprobs, _REASONS.get(update.finish))

    def _chunk(
        self, choice: Choice, body: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> bytes:
        line = {"index": choice.index, **body, "logprobs": logprobs, "finish_reason": reason}
        return event(self._chunk_head | {"choices": [line]})

    def usage_chunk(self) -> bytes:
        return event(self._chunk_head | {"choices": [], "usage": self.usage()})

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self.head | ({"object": "chat.completion.chunk"} if self.chat else {})

    # --- log-probabilities --------------------------------------------------------------------------------------------

    def _logprobs(self, found: Sequence[TokenLogprob], offsets: Sequence[int]) -> dict[str, Any] | None:
        if not found:
            return None
        if self.chat:
            return {
                "content": [
                    self._entry(one.token, one.logprob)
                    | {"top_logprobs": [self._entry(token, value) for token, value in one.top]}
                    for one in found
                ]
            }
        return {
            "tokens": [self.spelling.text(one.token) for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self.spelling.text(token): value for token, value in one.top} for one in found],
            "text_offset": list(offsets),
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.spelling.text(token), "logprob": logprob, "bytes": list(self.spelling.bytes(token))}


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
