"""The routes that generate text, whole or as a stream; a client that disconnects ends its request."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qsun.serve.api.answers.answer import Answer
from qsun.serve.api.answers.chat import ChatAnswer
from qsun.serve.api.answers.response import ResponseAnswer
from qsun.serve.api.bodies.chat import ChatBody
from qsun.serve.api.bodies.completion import CompletionBody
from qsun.serve.api.bodies.responses import ResponsesBody
from qsun.serve.api.completions import Completions, Reply
from qsun.serve.api.errors import DESCRIBED
from qsun.serve.http.errors import HttpError
from qsun.serve.http.guard import disconnected
from qsun.serve.http.wire import KEEP_ALIVE

KEEP_ALIVE_SECONDS = 15.0


def add_generation_routes(app: FastAPI, completions: Completions, check_open: Callable[[], None]) -> None:
    async def answer(
        body: CompletionBody | ChatBody, http: Request, kind: Callable[..., Answer] = ChatAnswer
    ) -> Response:
        check_open()
        reply = await completions.start(body, kind)
        if body.stream:
            return _EventStream(reply)
        try:
            return JSONResponse(await _unless_gone(http, reply.whole()))
        finally:
            reply.updates.close()

    @app.post("/v1/completions", responses=DESCRIBED, response_class=JSONResponse)
    async def complete(body: CompletionBody, http: Request) -> Response:
        return await answer(body, http)

    @app.post("/v1/chat/completions", responses=DESCRIBED, response_class=JSONResponse)
    async def chat(body: ChatBody, http: Request) -> Response:
        return await answer(body, http)

    @app.post("/v1/responses", responses=DESCRIBED, response_class=JSONResponse)
    async def respond(body: ResponsesBody, http: Request) -> Response:
        """OpenAI's Responses API for text and functions. Nothing is stored between requests."""
        return await answer(body.as_chat(), http, partial(ResponseAnswer, settings=body.settings()))


class _EventStream(StreamingResponse):
    """A reply as server-sent events. However it ends, also before its first event, its requests end with it."""

    def __init__(self, reply: Reply):
        self._reply, self._events = reply, kept_alive(reply.stream())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.updates.close()
            await self._events.aclose()  # Starlette leaves it open where the client cannot be sent to


async def kept_alive(
    stream: AsyncGenerator[bytes, None], seconds: float = KEEP_ALIVE_SECONDS
) -> AsyncGenerator[bytes, None]:
    """Pass a stream on, with a comment whenever it is silent, so that proxies do not consider it dead.

    It is closed as soon as the client disconnects, not when it is garbage-collected.
    """
    piece = asyncio.ensure_future(anext(stream))
    try:
        while True:
            done, _ = await asyncio.wait([piece], timeout=seconds)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                data = piece.result()
            except StopAsyncIteration:
                return
            yield data
            piece = asyncio.ensure_future(anext(stream))
    finally:
        piece.cancel()
        await asyncio.wait([piece])
        await stream.aclose()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Return the work's result; if the client disconnects first, cancel the work."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HttpError(499, "the client closed the connection")
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
