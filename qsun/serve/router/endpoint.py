"""/v1/completions and /v1/chat/completions of the router: one request from its body to the last byte of its answer."""

import asyncio
import json
import logging
import time
from contextlib import AsyncExitStack, aclosing

from starlette.types import Message, Receive, Scope, Send

from qsun.serve.cluster.schema import RequestLimits
from qsun.serve.http.errors import HttpError
from qsun.serve.http.gathering import gathered
from qsun.serve.http.guard import ClientStalled, disconnected
from qsun.serve.http.wire import DONE_EVENT, encode_event
from qsun.serve.router.exchange.exchange import Exchange, WorkerAnswer
from qsun.serve.router.exchange.request import RoutedRequest, read_request
from qsun.serve.router.exchange.state import RouterState
from qsun.serve.router.exchange.tracing import request_span
from qsun.serve.router.exchange.worker_http import WorkerFailed

logger = logging.getLogger(__name__)

_UNKNOWN_MODEL = "-"


class GenerationEndpoint:
    """An ASGI application behind the guard. A client that disconnects ends its request at the worker, too."""

    def __init__(self, state: RouterState):
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await receive()  # the guard hands the body over in one message
        response = _Response(send)
        work = asyncio.create_task(self._serve(scope, bytes(first.get("body", b"")), response.send))
        disconnect = asyncio.create_task(disconnected(receive))
        cut_off = asyncio.create_task(self._state.cut_off.wait())
        tasks = [work, disconnect, cut_off]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if response.complete:  # servers report a disconnect after the last byte, too: only counting is left
                await asyncio.wait([work])
            left = disconnect.done()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not work.cancelled():
            work.result()
        elif not left:
            await response.cut_off()

    async def _serve(self, scope: Scope, body: bytes, send: Send) -> None:
        """Answer one request, and count its outcome."""
        state, limits, arrived = self._state, self._state.cluster.limits, time.monotonic()
        model, outcome = _UNKNOWN_MODEL, "client_gone"
        try:
            if state.draining:
                raise HttpError(503, "the router is shutting down; try another one", headers={"Retry-After": "1"})
            request = read_request(scope["path"], body, state.cluster.models, limits)
            model = request.model
            request_id = scope["state"]["request_id"]
            with request_span(scope["headers"], model=model, request_id=request_id):
                async with state.admission.permit(model, limits.deadline_seconds):
                    outcome = await self._exchange(request, limits, request_id, arrived, send)
        except HttpError as error:
            outcome = str(error.status)
            raise
        except asyncio.CancelledError:
            outcome = "503" if state.cut_off.is_set() else outcome
            raise
        except ClientStalled:
            raise
        except Exception:
            outcome = "500"  # our own fault, and not a client that left
            raise
        finally:
            state.metrics.requests.labels(model, outcome).inc()

    async def _exchange(
        self, request: RoutedRequest, limits: RequestLimits, request_id: str, arrived: float, send: Send
    ) -> str:
        metrics = self._state.metrics
        deadline = arrived + limits.deadline_seconds
        exchange = Exchange(self._state, limits, request, request_id, deadline)
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.001)):
                    answer = await exchange.start(stack)
            except TimeoutError:
                raise exchange.overdue() from None
            metrics.prompt_tokens.labels(request.model).inc(exchange.prompt_tokens)
            try:
                if answer.events is not None:
                    return await self._stream(answer, exchange, request, request_id, arrived, send)
                return await _send_whole(answer, send)
            finally:
                metrics.tokens.labels(request.model).inc(exchange.tokens)

    async def _stream(
        self,
        answer: WorkerAnswer,
        exchange: Exchange,
        request: RoutedRequest,
        request_id: str,
        arrived: float,
        send: Send,
    ) -> str:
        """Pass events on as they come. A stream that breaks ends with an error event and without [DONE]."""
        assert answer.events is not None
        metrics, first = self._state.metrics, time.monotonic()
        metrics.ttft.labels(request.model).observe(first - arrived)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        outcome, last = "ok", DONE_EVENT
        try:
            seconds = self._state.cluster.limits.gather_seconds
            async with aclosing(answer.events) as events, aclosing(gathered(events, seconds)) as parts:
                async for part in parts:
                    body = b"".join(map(encode_event, part))
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except WorkerFailed as failed:
            logger.warning("request %s broke off after %d tokens: %s", request_id, exchange.tokens, failed)
            self._state.health.report_failure(failed)
            outcome = "broken_stream"
            last = encode_event(HttpError(502, "the worker failed during the answer, which is incomplete").body())
        except HttpError as error:
            outcome, last = str(error.status), encode_event(error.body())
        if outcome == "ok" and exchange.tokens > 1:
            metrics.tpot.labels(request.model).observe((time.monotonic() - first) / (exchange.tokens - 1))
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return outcome


class _Response:
    """The response to a client, and how much of it has been sent."""

    def __init__(self, send: Send):
        self._send = send
        self.started = self.streaming = self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
        else:
            self.streaming = message.get("more_body", False)
            self.complete = not self.streaming
        await self._send(message)

    async def cut_off(self) -> None:
        """Tell a client whose answer is incomplete that no more of it will come."""
        message = "the router shut down before the answer was complete"
        error = HttpError(503, message, headers={"Retry-After": "1"})
        if not self.started:
            raise error
        if self.streaming:
            await self._send({"type": "http.response.body", "body": encode_event(error.body()), "more_body": False})


async def _send_whole(answer: WorkerAnswer, send: Send) -> str:
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return "ok" if answer.status == 200 else str(answer.status)
