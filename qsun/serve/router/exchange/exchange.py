"""One request through the cluster: prefill, decode, and again on other workers until the client gets its first byte.

From then on there is no second try: the client has seen text that another attempt would not repeat. A stream that
breaks later ends with an error event and without [DONE].
"""

import asyncio
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
from qsun.serve.http.wire import DONE, BrokenStream, data_events, parse_event
from qsun.serve.router.exchange.health import HealthChecks
from qsun.serve.router.exchange.metrics import RouterMetrics
from qsun.serve.router.exchange.request import RoutedRequest
from qsun.serve.router.exchange.transfer import decode_body, prompt_tokens_of
from qsun.serve.router.exchange.worker_answers import completion_tokens, failure_in, for_client, tokens_in
from qsun.serve.router.exchange.worker_http import (
    Prefilled,
    RequestRefused,
    WorkerFailed,
    cause_of,
    opened,
    prefill,
    read_json,
)
from qsun.serve.router.workers.fleet import Fleet
from qsun.serve.router.workers.policies import Demand
from qsun.serve.router.workers.worker import Burden, Worker

logger = logging.getLogger(__name__)


@dataclass
class Answer:
    """What the client gets: a whole JSON answer, or the events of a stream."""

    status: int = 200
    body: dict[str, Any] | bytes | None = None
    events: AsyncGenerator[dict[str, Any], None] | None = None


class Exchange:
    """A request on its way. `deadline` is a time of `time.monotonic`.

    Attributes:
        tokens: that came so far. prompt_tokens: as the workers count them.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        fleet: Fleet,
        health: HealthChecks,
        metrics: RouterMetrics,
        limits: RequestLimits,
        request: RoutedRequest,
        request_id: str,
        deadline: float,
    ):
        self._client, self._fleet, self._health, self._metrics = client, fleet, health, metrics
        self._limits, self._request, self._request_id, self._deadline = limits, request, request_id, deadline
        self._tried: set[Worker] = set()
        self._asked: Worker | None = None  # the worker whose answer is being waited for,
        self._asked_at = 0.0  # and since when
        self.tokens = self.prompt_tokens = 0

    @property
    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    async def start(self, stack: AsyncExitStack) -> Answer:
        """Everything up to the first byte for the client. What has to stay open until the last one goes on the stack.

        Raises:
            HttpError: no worker, or every attempt failed.
        """
        last = ""
        for number in range(1, self._limits.attempts + 1):
            attempt = await stack.enter_async_context(AsyncExitStack())
            try:
                return await self._attempt(attempt, f"{self._request_id[:64]}.{number}.{uuid.uuid4().hex[:8]}")
            except RequestRefused as refused:
                await attempt.aclose()
                return Answer(refused.status, refused.body)
            except WorkerFailed as failed:
                await attempt.aclose()
                self._note(failed)
                last = str(failed)
        logger.error("request %s failed after %d attempts: %s", self._request_id, self._limits.attempts, last)
        raise HttpError(502, f"{self._limits.attempts} attempts failed, the last one at a {_without_url(last)}")

    def _note(self, failed: WorkerFailed) -> None:
        logger.warning("request %s: %s; starting again at prefill", self._request_id, failed)
        self._tried.add(failed.worker)
        self._metrics.retries.labels(failed.cause).inc()
        if failed.cause == "no_transfer":
            self._metrics.missing_transfers.labels(self._request.model).inc()
        self._health.blame(failed)

    def overdue(self) -> HttpError:
        """For an answer that did not begin within the deadline. A worker that was asked and hangs has failed.

        Not so one that was asked late: the queue, or other workers, took the time. And a single request that was only
        long does no harm: failures in a row open a circuit.
        """
        if self._asked is not None and time.monotonic() - self._asked_at >= self._limits.deadline_seconds / 2:
            detail = f"no answer within the deadline of {self._limits.deadline_seconds:g} seconds"
            self._health.blame(WorkerFailed(self._asked, "timeout", detail))
        return self._over()

    async def _attempt(self, stack: AsyncExitStack, attempt_id: str) -> Answer:
        request = self._request
        self._asked = None
        source = await self._prefill_worker()
        self._asked, self._asked_at = source, time.monotonic()
        with source.carrying(request.prompt_tokens):
            seconds = min(self._limits.prefill_seconds, self._left)
            filled = await prefill(self._client, source, request, attempt_id, seconds)
        self._health.praise(source, filled.engine_id)
        self.prompt_tokens = prompt_tokens = filled.prompt_tokens or request.prompt_tokens
        demand = Demand(request.model, prompt_tokens)
        target = self._fleet.choose_decode(source, demand, self._tried)
        if target is None:
            raise WorkerFailed(source, "no_decode_worker", "no decode worker is left that is warm with it")
        self._asked, self._asked_at = target, time.monotonic()
        max_tokens = request.max_tokens or self._most_tokens(target, prompt_tokens)
        body = decode_body(request, target.served_name, source.served_name, filled.params, max_tokens)
        burden = stack.enter_context(target.carrying(prompt_tokens + max_tokens))
        read_seconds = min(self._limits.stall_seconds, self._left) if request.stream else self._left
        timeout = httpx.Timeout(read_seconds, connect=min(10.0, self._left))
        try:
            opening = opened(self._client, target, request.path, body, attempt_id, timeout)
            response = await stack.enter_async_context(opening)
            return await self._first(stack, source, target, response, burden, filled)
        except WorkerFailed as failed:
            self._doubt(source, failed)
            raise

    async def _prefill_worker(self) -> Worker:
        """A prefill worker that has a decode worker; waits for one to become usable."""
        demand = Demand(self._request.model, self._request.prompt_tokens)
        until = time.monotonic() + min(self._limits.no_worker_seconds, self._left)
        while (chosen := self._fleet.choose_prefill(demand, self._tried)) is None:
            if demand.model not in self._fleet.prefill:
                raise HttpError(404, f"model {demand.model!r} is not served any more", param="model")
            if time.monotonic() >= until:
                message = f"no pair of workers is ready for model {self._request.model}; try again later"
                raise HttpError(503, message, headers={"Retry-After": "5"})
            await self._fleet.wait_for_change(until - time.monotonic())
        return chosen

    def _most_tokens(self, worker: Worker, prompt_tokens: int) -> int:
        """Of a chat that leaves it open: the limit, or what the worker's context has room for."""
        room = (worker.max_model_len or prompt_tokens + self._limits.max_tokens) - prompt_tokens
        return max(1, min(self._limits.max_tokens, room))

    async def _first(
        self,
        stack: AsyncExitStack,
        source: Worker,
        target: Worker,
        response: httpx.Response,
        burden: Burden,
        filled: Prefilled,
    ) -> Answer:
        """A whole answer, or a stream up to the event that shows that it is one: until then another try is possible."""
        burden.done(filled.prompt_tokens or self._request.prompt_tokens)
        if not self._request.stream:
            answer = await read_json(target, response)
            _check(target, answer, filled)
            self.tokens = completion_tokens(answer) or tokens_in(answer)
            self._health.praise(target)
            return Answer(body=for_client(answer, self._request))
        events = await stack.enter_async_context(aclosing(data_events(response.aiter_bytes())))
        opening: list[dict[str, Any]] = []
        while not opening or not _is_begun(opening[-1]):
            event = await _next(target, events)
            if event is None:
                raise WorkerFailed(target, "broken", "its stream ended before a token came")
            _check(target, event, filled)
            opening.append(event)
        self._health.praise(target)
        return Answer(events=self._relay(source, target, opening, events, burden))

    async def _relay(
        self,
        source: Worker,
        target: Worker,
        opening: list[dict[str, Any]],
        events: AsyncIterator[bytes],
        burden: Burden,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Events as the client sees them. Ends only where the worker said that it is done; else raises WorkerFailed."""
        begun = deque(opening)
        while True:
            event = begun.popleft() if begun else await self._following(source, target, events)
            if event is None:
                return
            count = tokens_in(event)
            burden.done(count)
            self.tokens = completion_tokens(event) or self.tokens + count
            shown = for_client(event, self._request)
            if shown is not None:
                yield shown
            if time.monotonic() > self._deadline:
                raise self._over()

    async def _following(self, source: Worker, target: Worker, events: AsyncIterator[bytes]) -> dict[str, Any] | None:
        """The next event after the opening; None after the last one."""
        try:
            async with asyncio.timeout(self._left):
                event = await _next(target, events)
            if event is not None:
                _check(target, event, None)
        except TimeoutError:
            raise self._over() from None
        except WorkerFailed as failed:
            self._doubt(source, failed)
            raise
        return event

    def _over(self) -> HttpError:
        return HttpError(504, f"the deadline of {self._limits.deadline_seconds:g} seconds is over")

    def _doubt(self, source: Worker, failed: WorkerFailed) -> None:
        """A decode worker that fails in these ways may not have got the KV cache."""
        if failed.worker.role == "decode" and failed.cause in ("status_5xx", "broken"):
            self._health.doubt(source, failed.worker)


def _is_begun(event: dict[str, Any]) -> bool:
    """Whether an event shows that the worker generates.

    The first one of a chat does not: vLLM sends the role before it looks whether the KV cache came.
    """
    return tokens_in(event) > 0 or any(choice.get("finish_reason") for choice in event["choices"])


async def _next(worker: Worker, events: AsyncIterator[bytes]) -> dict[str, Any] | None:
    """The next event of a stream; None after [DONE]."""
    try:
        data = await anext(events)
        return None if data == DONE else parse_event(data)
    except StopAsyncIteration:
        raise WorkerFailed(worker, "broken", "its stream ended without [DONE]") from None
    except (BrokenStream, httpx.HTTPError) as error:
        raise _broken(worker, error) from error


def _check(worker: Worker, answer: dict[str, Any], filled: Prefilled | None) -> None:
    """Raise WorkerFailed where an answer is not to be trusted."""
    failure = failure_in(answer)
    if failure:
        raise WorkerFailed(worker, "broken", failure)
    theirs = prompt_tokens_of(answer)
    if filled and theirs and filled.prompt_tokens and theirs != filled.prompt_tokens:
        detail = f"it reads {theirs} prompt tokens where the prefill worker read {filled.prompt_tokens}"
        raise WorkerFailed(worker, "broken", detail)


def _broken(worker: Worker, error: BrokenStream | httpx.HTTPError) -> WorkerFailed:
    cause = cause_of(error) if isinstance(error, httpx.HTTPError) else "broken"
    return WorkerFailed(worker, cause, str(error) or type(error).__name__)


def _without_url(message: str) -> str:
    """A client need not know where the workers are."""
    return " ".join(word for word in message.split() if "://" not in word)
