"""From a body of OpenAI's API to requests of the engine, and from its updates to an answer or a stream."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from qsun.data.chat import render_prompt
from qsun.engine.engine import Engine
from qsun.engine.requests import Full, Refused, Request, Sampling, Update
from qsun.engine.thread import SHUTTING_DOWN, EngineThread
from qsun.errors import QsunError
from qsun.model.locate import encode
from qsun.runtime.sampling import row_seed
from qsun.serve.api.answers import DONE, Answer, Choice, event
from qsun.serve.api.bodies import MOST_CHOICES, ChatBody, CompletionBody
from qsun.serve.api.token_text import Spelling
from qsun.serve.http.errors import HttpError, busy

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class ServeLimits:
    """What one request may ask for.

    Attributes:
        max_tokens: of one answer; 0: as many as the model has positions for. seconds: until it is given up.
        default_tokens: of a chat that names no number; 0: as many as there is room for. KV for all is kept free: with
            a large number few requests fit at a time.
    """

    max_tokens: int = 0
    seconds: float = 600.0
    default_tokens: int = 1024

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.default_tokens) < 0 or not self.seconds > 0:
            raise QsunError(
                f"max_tokens {self.max_tokens}, default_tokens {self.default_tokens} and seconds {self.seconds:g} are "
                "out of range; use 0 or more"
            )


@dataclass(frozen=True)
class Reply:
    """An answer on its way: empty yet, with the updates that fill it."""

    answer: Answer
    updates: AsyncGenerator[Update, None]
    choices: dict[str, Choice]

    def take(self, update: Update) -> Choice:
        """Raises HttpError where the request failed."""
        if update.finish in ("timeout", "error"):
            status = 504 if update.finish == "timeout" else 503 if update.error == SHUTTING_DOWN else 500
            raise HttpError(status, update.error)
        choice = self.choices[update.request]
        choice.take(update)
        return choice

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self.updates) as updates:
            async for update in updates:
                self.take(update)
        return self.answer.whole()

    async def stream(self, with_usage: bool) -> AsyncGenerator[bytes, None]:
        """Server-sent events. A failure is an event of its own, and no [DONE] follows it."""
        async with aclosing(self.updates) as updates:
            for opening in self.answer.opening():
                yield opening
            try:
                async for update in updates:
                    chunk = self.answer.chunk(self.take(update), update)
                    if chunk is not None:
                        yield chunk
            except HttpError as failure:
                yield event(failure.body())
                return
        if with_usage:
            yield self.answer.usage_chunk()
        yield DONE


class Completions:
    """Queues what bodies ask for."""

    def __init__(self, engine: Engine, thread: EngineThread, limits: ServeLimits):
        self.engine, self.thread, self.limits = engine, thread, limits
        self._spelling = Spelling(engine.tokenizer)

    async def start(self, body: CompletionBody | ChatBody) -> Reply:
        """Queue the requests of a body, all or none. Raises HttpError for what cannot be answered."""
        try:
            prompts = await asyncio.to_thread(self._prompts, body)
            requests = self._requests(body, prompts)
            updates = await self.thread.submit(requests)
        except Full as full:
            raise busy(str(full), self._retry_seconds()) from None
        except Refused as refused:
            raise HttpError(503 if self.thread.failure else 404, str(refused), "model") from None
        except QsunError as error:
            raise HttpError(400, str(error).replace("max_new_tokens", "max_tokens")) from None
        chat, lengths = isinstance(body, ChatBody), [len(prompt) for prompt in prompts]
        answer = Answer(chat, body.model, lengths, body.n or 1, self._spelling, body.return_token_ids)
        choices = {request.id: choice for request, choice in zip(requests, answer.choices, strict=True)}
        return Reply(answer, updates, choices)

    def _prompts(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        tokenizer = self.engine.tokenizer
        given: Sequence[str | list[int]]
        if isinstance(body, ChatBody):
            given = [render_prompt(tokenizer, [message.plain() for message in body.messages])]
        else:
            given = body.prompts
        if tokenizer is None and any(isinstance(prompt, str) for prompt in given):
            raise QsunError("the model has no tokenizer; give prompts as token ids")
        return [encode(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in given]

    def _requests(self, body: CompletionBody | ChatBody, prompts: list[list[int]]) -> list[Request]:
        n = body.n or 1
        if len(prompts) * n > MOST_CHOICES:
            raise HttpError(400, f"{len(prompts)} prompts x n {n} is over the limit of {MOST_CHOICES} answers", "n")
        seed = secrets.randbits(32) if body.seed is None else body.seed
        return [
            Request(
                uuid.uuid4().hex,
                body.model,
                tuple(prompts[number // n]),
                Sampling(
                    max_new_tokens=self._max_tokens(body, len(prompts[number // n])),
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    top_k=body.top_k,
                    seed=row_seed(seed, number),
                    stop=body.stops,
                    ignore_eos=body.ignore_eos,
                    logprobs=body.wanted_logprobs,
                ),
                self.limits.seconds,
            )
            for number in range(len(prompts) * n)
        ]

    def _max_tokens(self, body: CompletionBody | ChatBody, prompt_tokens: int) -> int:
        chat = isinstance(body, ChatBody)
        asked = (body.max_completion_tokens if isinstance(body, ChatBody) else None) or body.max_tokens
        most = self.limits.max_tokens
        if asked is None and not chat:
            asked = _DEFAULT_COMPLETION_TOKENS if not most else min(most, _DEFAULT_COMPLETION_TOKENS)
        if asked is None:
            room = min(self.engine.positions, self.engine.budget_tokens) + 1 - prompt_tokens
            limits = [limit for limit in (most, self.limits.default_tokens) if limit]
            return max(1, min([room, *limits]))
        if most and asked > most:
            raise HttpError(400, f"max_tokens {asked} is over this server's limit of {most}", "max_tokens")
        return asked

    def _retry_seconds(self) -> float:
        """About when the queue will have moved on by a tenth."""
        state = self.thread.state
        return min(60.0, 0.1 * state.waiting / max(state.finished_per_second, 1e-3))
