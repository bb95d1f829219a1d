"""What whole answers and streams have in common: choices as they grow, ids, and token counts."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from qsun.engine.requests import TokenLogprob, Update
from qsun.serve.api.answers.token_text import Spelling
from qsun.serve.api.tools.parser import Call, ToolParser
from qsun.serve.http.errors import HttpError
from qsun.serve.http.wire import DONE_EVENT, encode_event

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Choice:
    """One answer as it grows.

    Attributes:
        parser: where the answer may call tools. text: what the client sees of it, without calls.
        offsets: of each token: the length of the model's text before it.
        prompt_logprobs: of all of the prompt's tokens but the first, which nothing predicts.
        prompt_only: the client asked for no token (max_tokens 0), so the one that the engine chose is not part of it.
    """

    index: int
    prompt: Sequence[int]
    parser: ToolParser | None = None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""
    cached_tokens: int = 0
    offsets: list[int] = field(default_factory=list)
    prompt_only: bool = False
    _written: int = 0

    def take(self, update: Update) -> tuple[str, list[Call]]:
        """Apply an update. Returns the new content and calls that the client sees."""
        if self.prompt_only:
            update = replace(update, tokens=(), text="", logprobs=(), finish=update.finish and "length")
        self.offsets += [self._written] * len(update.tokens)
        self._written += len(update.text)
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish = update.finish
        self.cached_tokens += update.cached_tokens
        content, calls = update.text, list[Call]()
        if self.parser is not None:
            content, calls = self.parser.feed(update.text, bool(update.finish))
        self.text += content
        self.calls += calls
        return content, calls

    @property
    def calls_before_text(self) -> int:
        """How many of the calls the model made before it said anything."""
        return 0 if self.parser is None else self.parser.calls_before_content

    @property
    def reason(self) -> str | None:
        reason = REASONS.get(self.finish)
        return "tool_calls" if reason == "stop" and self.calls else reason


@dataclass(frozen=True)
class Style:
    """How a client wants its answer formatted.

    Attributes:
        include_usage, continuous_usage: token counts at the end of a stream, and in all of its chunks.
    """

    spelling: Spelling
    token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


class Answer(ABC):
    """Builds the JSON of one request's answer, whole or as the events of a stream; a subclass for each format.

    Args:
        prompts: tokens of each prompt; its n choices share it.
        parsers: one for each choice where the answer may call tools.
    Attributes:
        prefix: of the answer's id.
    """

    prefix: ClassVar[str]

    def __init__(
        self,
        model: str,
        prompts: Sequence[Sequence[int]],
        n: int,
        style: Style,
        parsers: Sequence[ToolParser | None] | None = None,
    ):
        self.model, self.style, self._n = model, style, n
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        parsers = parsers or [None] * (len(prompts) * n)
        self.choices = [Choice(i, prompts[i // n], parser) for i, parser in enumerate(parsers)]

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """Return the finished answer."""

    @abstractmethod
    def opening(self) -> Iterator[bytes]:
        """Yield the events that a stream begins with."""

    @abstractmethod
    def events(self, choice: Choice, update: Update) -> Iterator[bytes]:
        """Apply an update, and yield what the client sees of it."""

    @abstractmethod
    def closing(self) -> Iterator[bytes]:
        """Yield the events that end a stream."""

    @abstractmethod
    def failure(self, error: HttpError) -> bytes:
        """Return the event that ends a stream that failed."""

    def usage(self) -> dict[str, Any]:
        n = self._n
        prompt = sum(len(choice.prompt) for choice in self.choices[::n])  # n choices share one prompt
        completion = sum(len(choice.tokens) for choice in self.choices)
        cached = sum(max(c.cached_tokens for c in self.choices[i : i + n]) for i in range(0, len(self.choices), n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChoicesAnswer(Answer):
    """An answer that is a list of choices, whose stream ends with [DONE]: chat and text completions.

    Attributes:
        kind, chunk_kind: `object` of a whole answer and of a chunk.
    """

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""

    def whole(self) -> dict[str, Any]:
        return self._body(self.kind, [self.choice(choice) for choice in self.choices]) | {"usage": self.usage()}

    def closing(self) -> Iterator[bytes]:
        if self.style.include_usage:
            yield self.chunk([], self.usage())
        yield DONE_EVENT

    def failure(self, error: HttpError) -> bytes:
        return encode_event(error.body())

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        if usage is None and self.style.continuous_usage:
            usage = self.usage()
        return encode_event(self._body(self.chunk_kind, choices) | ({} if usage is None else {"usage": usage}))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def token_ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self.style.token_ids else {}
