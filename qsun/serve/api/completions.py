"""From a body of OpenAI's API to requests of the engine, and from their updates to an answer or a stream."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from qsun.config import Settings
from qsun.engine.config import Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Full, Refused, Request, Update
from qsun.engine.thread import SHUTTING_DOWN, EngineThread, Updates
from qsun.errors import QsunError
from qsun.runtime.tokens.sampling import row_seed
from qsun.serve.api.answers.answer import Answer, Choice, Style
from qsun.serve.api.answers.chat import ChatAnswer
from qsun.serve.api.answers.completion import CompletionAnswer
from qsun.serve.api.answers.token_text import Spelling
from qsun.serve.api.bodies.chat import ChatBody
from qsun.serve.api.bodies.completion import CompletionBody
from qsun.serve.api.bodies.fields import MOST_CHOICES
from qsun.serve.api.prompts import PromptTokenizer, context_exceeded
from qsun.serve.api.structured import Grammars, call_schema
from qsun.serve.api.tools.formats import FORCED, FORMATS, ToolFormat, format_of
from qsun.serve.api.tools.parser import ToolParser
from qsun.serve.http.errors import HttpError, busy

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")
_SAME_IN_SAMPLING = ("top_p", "min_p", *_PENALTIES, "logit_bias", "stop_token_ids", "ignore_eos")


class ServeLimits(Settings):
    """What one request may ask for.

    Attributes:
        max_tokens: of one answer; 0: as many as the model has positions for. seconds: time limit of a request.
        default_tokens: of a chat that names no number; 0: as many as there is room for. KV for all is reserved: with
            a large number few requests fit at a time.
        tool_format: in which the model calls tools; "": the chat template's.
    """

    max_tokens: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(gt=0)] = 600.0
    default_tokens: Annotated[int, Field(ge=0)] = 1024
    tool_format: Literal["", "hermes", "mistral", "llama3"] = ""


@dataclass(frozen=True)
class Reply:
    """An answer in progress: still empty, with the updates that fill it, which whoever sends it must close."""

    answer: Answer
    updates: Updates
    choices: dict[str, Choice]

    def _choice(self, update: Update) -> Choice:
        """Return the choice of an update. Raises HttpError where the request failed."""
        if update.finish in ("timeout", "error"):
            status = 504 if update.finish == "timeout" else 503 if update.error == SHUTTING_DOWN else 500
            raise HttpError(status, update.error)
        return self.choices[update.request]

    async def whole(self) -> dict[str, Any]:
        async for update in self.updates:
            self._choice(update).take(update)
        return self.answer.whole()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events. A failure is an event of its own, and no [DONE] follows it."""
        for event in self.answer.opening():
            yield event
        try:
            async for update in self.updates:
                for event in self.answer.events(self._choice(update), update):
                    yield event
        except HttpError as failure:
            yield self.answer.failure(failure)
            return
        for event in self.answer.closing():
            yield event


class Completions:
    """Turns bodies into requests of the engine."""

    def __init__(self, engine: Engine, thread: EngineThread, limits: ServeLimits):
        self.engine, self.thread, self.limits = engine, thread, limits
        self.prompts = PromptTokenizer(engine.tokenizer, engine.positions)
        self._grammars = Grammars(engine.tokenizer, engine.decode.model.config.vocab_size, engine.eos)
        self._spelling = Spelling(engine.tokenizer)

    async def start(self, body: CompletionBody | ChatBody, answer_type: Callable[..., Answer] = ChatAnswer) -> Reply:
        """Queue the requests of a body, all or none. Raises HttpError for what cannot be answered.

        Args:
            answer_type: the format of the answer to a chat.
        """
        try:
            form = self._tool_format(body)
            prompts = await self._tokens(body)
            requests = await self._requests(body, prompts, form)
            answer = self._answer(body, prompts, form, answer_type)
            updates = await self.thread.submit(requests)
        except Full as full:
            raise busy(str(full), self._retry_seconds()) from None
        except Refused as refused:
            raise HttpError(503 if self.thread.failure else 404, str(refused), "model") from None
        except QsunError as error:
            raise HttpError(400, str(error).replace("max_new_tokens", "max_tokens")) from None
        choices = {request.id: choice for request, choice in zip(requests, answer.choices, strict=True)}
        return Reply(answer, updates, choices)

    def _tool_format(self, body: CompletionBody | ChatBody) -> ToolFormat | None:
        """Return the format in which the answer may call tools."""
        if not isinstance(body, ChatBody) or not body.usable_tools:
            return None
        if self.limits.tool_format:
            form = FORMATS[self.limits.tool_format]
        else:
            form = format_of(getattr(self.engine.tokenizer, "chat_template", None))
        return FORCED if body.forced_tools else form

    async def _tokens(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        if isinstance(body, ChatBody):
            return [await self.prompts.of_conversation(body)]
        return await self.prompts.of_texts(body.prompt)

    async def _requests(
        self, body: CompletionBody | ChatBody, prompts: list[list[int]], form: ToolFormat | None
    ) -> list[Request]:
        if len(prompts) * body.n > MOST_CHOICES:
            raise HttpError(
                400, f"{len(prompts)} prompts x n {body.n} is over the limit of {MOST_CHOICES} answers", "n"
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed
        schema = self._schema(body)
        requests = []
        for number in range(len(prompts) * body.n):
            prompt = prompts[number // body.n]
            settings = self._settings(body, len(prompt)) | {"seed": row_seed(seed, number)}
            if form is not None and form.special:
                settings["skip_special_tokens"] = False
            if schema is not None:
                settings["constraint"] = await asyncio.to_thread(self._grammars.json, schema)
            sampling = Sampling(**settings)
            requests.append(Request(uuid.uuid4().hex, body.model, tuple(prompt), sampling, self.limits.seconds))
        return requests

    def _schema(self, body: CompletionBody | ChatBody) -> dict[str, Any] | None:
        """Return the JSON schema that the answer must satisfy; None: any text."""
        if not isinstance(body, ChatBody):
            return None
        forced = body.forced_tools
        schema = call_schema([tool.function.model_dump() for tool in forced]) if forced else body.schema_of_answer
        if schema is not None and (body.min_tokens or body.ignore_eos):
            raise HttpError(
                400,
                "min_tokens and ignore_eos cannot be combined with a structured answer; leave them out",
                "min_tokens",
            )
        return schema

    def _settings(self, body: CompletionBody | ChatBody, prompt_tokens: int) -> dict[str, Any]:
        echo = isinstance(body, CompletionBody) and body.echo
        return {name: getattr(body, name) for name in _SAME_IN_SAMPLING} | {
            "max_new_tokens": self._max_tokens(body, prompt_tokens),
            "min_new_tokens": body.min_tokens,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_k": max(body.top_k, 0),
            "stop": tuple(body.stop),
            "logprobs": body.wanted_logprobs,
            "prompt_logprobs": body.wanted_logprobs if echo else None,
        }

    def _max_tokens(self, body: CompletionBody | ChatBody, prompt_tokens: int) -> int:
        chat = isinstance(body, ChatBody)
        asked = (body.max_completion_tokens if isinstance(body, ChatBody) else None) or body.max_tokens
        most, positions = self.limits.max_tokens, self.engine.positions
        if asked == 0:
            asked = 1  # echo alone: the answer leaves out the token that the engine chooses
        if asked is None and not chat:
            asked = _DEFAULT_COMPLETION_TOKENS if not most else min(most, _DEFAULT_COMPLETION_TOKENS)
        if asked is None:
            limits = [limit for limit in (most, self.limits.default_tokens) if limit]
            asked = max(1, min([self.engine.room(prompt_tokens), *limits]))
        if most and asked > most:
            raise HttpError(400, f"max_tokens {asked} is over this server's limit of {most}", "max_tokens")
        if prompt_tokens + asked - 1 > positions:
            raise context_exceeded(positions, str(prompt_tokens), asked, "messages" if chat else "prompt")
        return asked

    def _answer(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Sequence[int]],
        form: ToolFormat | None,
        answer_type: Callable[..., Answer],
    ) -> Answer:
        options = body.stream_options
        style = Style(
            self._spelling,
            body.return_token_ids,
            options is not None and options.include_usage,
            options is not None and options.continuous_usage_stats,
        )
        if isinstance(body, CompletionBody):
            answer = CompletionAnswer(body.model, prompts, body.n, style)
            answer.echo, answer.prompt_logprobs = body.echo, body.echo and body.logprobs is not None
            for choice in answer.choices:
                choice.prompt_only = body.max_tokens == 0
            answer.prompt_texts = [
                prompt if isinstance(prompt, str) else self._text(prompt) for prompt in body.prompt if body.echo
            ]
            return answer
        most = None if body.parallel_tool_calls else 1
        parsers = [None if form is None else ToolParser(form, most) for _ in range(body.n)]
        return answer_type(body.model, prompts, body.n, style, parsers)

    def _text(self, tokens: Sequence[int]) -> str:
        tokenizer = self.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(tokens)

    def _retry_seconds(self) -> float:
        """Return roughly how long a tenth of the queue takes."""
        state = self.thread.state
        return min(60.0, 0.1 * state.waiting / max(state.finished_per_second, 1e-3))
