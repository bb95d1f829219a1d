"""One request through the cluster: prefill, decode, and retries on other workers until the client gets its first byte.

After that there is no retry: the client has seen text that another attempt might not repeat. A stream that breaks later
ends with an error event and without [DONE].
"""

import asyncio
import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from qsun.serve.cluster.schema import RequestLimits
from qsun.serve.http.errors import HttpError
from qsun.serve.http.wire import DONE, BrokenStream, data_events, parse_event, usage_count
from qsun.serve.router.exchange.request import CHARACTERS_PER_TOKEN, RoutedRequest
from qsun.serve.router.exchange.state import RouterState
from qsun.serve.router.exchange.tracing import mark, worker_span
from qsun.serve.router.exchange.transfer import decode_body
from qsun.serve.router.exchange.worker_answers import checked_tokens, for_client
from qsun.serve.router.exchange.worker_http import (
    Prefilled,
    RequestRefused,
    WorkerFailed,
    cause_of,
    opened,
    prefill,
    read_json,
    time_to_answer,
)
from qsun.serve.router.workers.policies import Demand
from qsun.serve.router.workers.worker import TokenLoad, Worker

logger = logging.getLogger(__name__)

_EVENTS_A_TURN = 8  # under a millisecond


@dataclass
class WorkerAnswer:
    """A worker's answer for the client: a whole body, or the events of a stream."""

    status: int = 200
    body: dict[str, Any] | bytes | None = None
    events: AsyncGenerator[dict[str, Any], None] | None = None


@dataclass(frozen=True)
class _Transfer:
    """An attempt whose prefill is done: KV cache of `source`, which `target` decodes. load: what it has left to do."""

    source: Worker
    target: Worker
    filled: Prefilled
    load: TokenLoad


class Exchange:
    """A request on its way through the cluster.

    Args:
        limits: those at its arrival. deadline: a time of `time.monotonic`.
    Attributes:
        tokens: received so far. prompt_tokens: as the workers count them.
    """

    def __init__(
        self, state: RouterState, limits: RequestLimits, request: RoutedRequest, request_id: str, deadline: float
    ):
        self._state, self._fleet, self._health = state, state.fleet, state.health
        self._limits, self._request, self._request_id, self._deadline = limits, request, request_id, deadline
        self._tried: set[Worker] = set()
        self._asked: Worker | None = None  # the worker whose answer is awaited,
        self._asked_at = 0.0  # and since when
        self.tokens = self.prompt_tokens = 0

    @property
    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    async def start(self, stack: AsyncExitStack) -> WorkerAnswer:
        """Run until there is a first byte for the client. The stack holds what must stay open until the last one.

        Raises:
            HttpError: there is no worker, or every attempt failed.
        """
        last: WorkerFailed | None = None
        for number in range(1, self._limits.attempts + 1):
            attempt = await stack.enter_async_context(AsyncExitStack())
            try:
                return await self._attempt(attempt, f"{self._request_id[:64]}.{number}.{uuid.uuid4().hex[:8]}")
            except RequestRefused as refused:
                await attempt.aclose()
                return WorkerAnswer(refused.status, refused.body)
            except WorkerFailed as failed:
                await attempt.aclose()
                self._note(failed)
                last = failed
        logger.error("request %s failed after %d attempts: %s", self._request_id, self._limits.attempts, last)
        if last is not None and last.cause == "busy":
            raise HttpError(503, "all workers are busy; try again later", headers={"Retry-After": "1"})
        raise HttpError(502, f"{self._limits.attempts} attempts failed, the last one at a {_without_url(str(last))}")

    def _note(self, failed: WorkerFailed) -> None:
        logger.warning("request %s: %s; retrying from prefill", self._request_id, failed)
        first = failed.worker not in self._tried
        self._tried.add(failed.worker)
        self._state.metrics.retries.labels(failed.cause).inc()
        if failed.cause == "no_transfer":
            self._state.metrics.missing_transfers.labels(self._request.model).inc()
        self._health.report_failure(failed, first)

    def overdue(self) -> HttpError:
        """Return the error for an answer that did not begin within the deadline.

        The awaited worker is suspected of hanging if it had half of the time; before, the queue or other workers took
        it.
        """
        if self._asked is not None and time.monotonic() - self._asked_at >= self._limits.deadline_seconds / 2:
            detail = f"no answer within the deadline of {self._limits.deadline_seconds:g} seconds"
            self._health.report_failure(WorkerFailed(self._asked, "timeout", detail))
        return self._late()

    async def _attempt(self, stack: AsyncExitStack, attempt_id: str) -> WorkerAnswer:
        request = self._request
        self._asked, self.tokens = None, 0
        source = await self._prefill_worker()
        name = source.name_of(request.model)  # now: a reload may change it while the prompt is read
        alone = source.role == "aggregated"
        filled = Prefilled(None, None, None) if alone else await self._prefill(source, name, attempt_id)
        self.prompt_tokens = prompt_tokens = filled.prompt_tokens or request.prompt_tokens
        target = self._fleet.choose_decode(source, Demand(request.model, prompt_tokens), self._tried)
        if target is None:
            raise WorkerFailed(source, "no_decode_worker", "no decode worker warm with it is left")
        self._asked, self._asked_at = target, time.monotonic()
        # of text that nobody has counted, an engine that answers alone gives as much as its context has left
        longest = filled.prompt_tokens or (prompt_tokens if alone else CHARACTERS_PER_TOKEN * prompt_tokens)
        most = request.max_tokens or self._most_tokens(target, longest)
        served, max_tokens = (name, request.max_tokens) if alone else (target.name_of(request.model), most)
        body = decode_body(request, served, name, filled.params, max_tokens)
        load = stack.enter_context(target.handling(prompt_tokens + most))
        first_seconds = self._limits.prefill_seconds if alone else self._limits.stall_seconds
        timeout = time_to_answer(min(first_seconds, self._left) if request.stream else self._left)
        stack.enter_context(worker_span("decode", worker=target.url, attempt=attempt_id, prompt_tokens=prompt_tokens))
        try:
            opening = opened(self._state.client, target, request.path, body, attempt_id, timeout)
            response = await stack.enter_async_context(opening)
            if not alone:
                load.done(prompt_tokens)
            return await self._first(stack, _Transfer(source, target, filled, load), response)
        except WorkerFailed as failed:
            failed.source = source
            raise

    async def _prefill(self, source: Worker, name: str, attempt_id: str) -> Prefilled:
        request = self._request
        self._asked, self._asked_at = source, time.monotonic()
        with source.handling(request.prompt_tokens), worker_span("prefill", worker=source.url, attempt=attempt_id):
            seconds = min(self._limits.prefill_seconds, self._left)
            filled = await prefill(self._state.client, source, request, name, attempt_id, seconds)
        self._health.report_success(source, filled.engine_id)
        return filled

    async def _prefill_worker(self) -> Worker:
        """Return a prefill worker that has a decode worker; wait for one to become usable."""
        demand = Demand(self._request.model, self._request.prompt_tokens, self._request.beginning)
        until = time.monotonic() + min(self._limits.no_worker_seconds, self._left)
        while (chosen := self._fleet.choose_prefill(demand, self._tried)) is None:
            if demand.model not in self._fleet.prefill:
                raise HttpError(404, f"model {demand.model!r} is no longer served", param="model")
            if time.monotonic() >= until:
                message = f"no pair of workers is ready for model {self._request.model}; try again later"
                raise HttpError(503, message, headers={"Retry-After": "5"})
            await self._fleet.wait_for_change(until - time.monotonic())
        return chosen

    def _most_tokens(self, worker: Worker, prompt_tokens: int) -> int:
        """Return max_tokens for a request that leaves it open: the limit, or what the worker's context has left."""
        room = (worker.max_model_len or prompt_tokens + self._limits.max_tokens) - prompt_tokens
        return max(1, min(self._limits.max_tokens, room))

    async def _first(self, stack: AsyncExitStack, transfer: _Transfer, response: httpx.Response) -> WorkerAnswer:
        """Return a whole answer, or a stream once an event shows that tokens come: a retry is possible until then."""
        if not self._request.stream:
            answer = await read_json(transfer.target, response)
            self._count(transfer, answer)
            self._health.report_success(transfer.target)
            return WorkerAnswer(body=for_client(answer, self._request))
        events = await stack.enter_async_context(aclosing(data_events(response.aiter_bytes())))
        opening: list[dict[str, Any]] = []
        while not opening or not (self.tokens or _finishes(opening[-1])):
            event = await self._next(transfer, events)
            if event is None:
                raise WorkerFailed(transfer.target, "broken", "its stream ended before a token came")
            opening.append(event)
        if transfer.source is transfer.target:
            transfer.load.done(self.prompt_tokens)
        mark("first token")
        self._health.report_success(transfer.target)
        return WorkerAnswer(events=self._relay(transfer, opening, events))

    async def _relay(
        self, transfer: _Transfer, opening: list[dict[str, Any]], events: AsyncIterator[bytes]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield events for the client, and return at [DONE].

        Raises:
            WorkerFailed: the stream broke. HttpError: the deadline is over.
        """
        begun = deque(opening)
        for number in itertools.count(1):
            if number % _EVENTS_A_TURN == 0:
                await asyncio.sleep(0)  # a stream whose events have all arrived must not hold up other requests
            event = begun.popleft() if begun else await self._following(transfer, events)
            if event is None:
                return
            shown = for_client(event, self._request)
            if shown is not None:
                yield shown
            if time.monotonic() > self._deadline:
                raise self._late()

    async def _following(self, transfer: _Transfer, events: AsyncIterator[bytes]) -> dict[str, Any] | None:
        """Return the next event after the opening; None at [DONE]."""
        stall_seconds = self._limits.stall_seconds
        try:
            async with asyncio.timeout(min(stall_seconds, self._left)):
                return await self._next(transfer, events)
        except TimeoutError:
            if time.monotonic() >= self._deadline:
                raise self._late() from None
            stalled = WorkerFailed(transfer.target, "timeout", f"no event within {stall_seconds:g} seconds")
            stalled.source = transfer.source
            raise stalled from None
        except WorkerFailed as failed:
            failed.source = transfer.source
            raise

    async def _next(self, transfer: _Transfer, events: AsyncIterator[bytes]) -> dict[str, Any] | None:
        """Return the next event of a stream, checked and counted; None at [DONE]."""
        try:
            data = await anext(events)
            event = None if data == DONE else parse_event(data)
        except StopAsyncIteration:
            raise WorkerFailed(transfer.target, "broken", "its stream ended without [DONE]") from None
        except BrokenStream as broken:
            raise WorkerFailed(transfer.target, "broken", str(broken)) from None
        except httpx.HTTPError as error:
            raise WorkerFailed(transfer.target, cause_of(error), str(error) or type(error).__name__) from error
        if event is not None:
            self._count(transfer, event)
        return event

    def _count(self, transfer: _Transfer, answer: dict[str, Any]) -> None:
        """Count the tokens of an answer or event. Raises WorkerFailed if it is not valid."""
        try:
            count = checked_tokens(answer, transfer.filled.prompt_tokens)
            self.tokens = usage_count(answer, "completion_tokens") or self.tokens + count
        except BrokenStream as broken:
            raise WorkerFailed(transfer.target, "broken", str(broken)) from None
        transfer.load.done(count)

    def _late(self) -> HttpError:
        return HttpError(504, f"the deadline of {self._limits.deadline_seconds:g} seconds is over")


def _finishes(event: dict[str, Any]) -> bool:
    """Return whether an event ends a choice. A chat's first event proves nothing: vLLM sends the role before it
    knows whether the KV cache arrived."""
    return any(choice.get("finish_reason") for choice in event["choices"])


def _without_url(message: str) -> str:
    """Remove addresses: clients need not know where the workers are."""
    return " ".join(word for word in message.split() if "://" not in word)
