"""The HTTP side of the in-process engine: OpenAI's API, health, readiness, metrics, and administration if asked for."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from qsun._version import __version__
from qsun.engine.engine import Engine
from qsun.engine.thread import SHUTTING_DOWN, EngineThread
from qsun.serve.api.admin import add_admin_routes
from qsun.serve.api.bodies import ChatBody, CompletionBody
from qsun.serve.api.completions import Completions, ServeLimits
from qsun.serve.api.metrics import Metrics
from qsun.serve.http.errors import HttpError

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in (
        (400, "The body asks for what cannot be done; the message says what."),
        (401, "No valid API key."),
        (404, "No such model."),
        (408, "The body did not come in time."),
        (413, "The body is too long."),
        (429, "The server is full; Retry-After says when to come again."),
        (500, "The model failed."),
        (503, "The server is shutting down."),
        (504, "The answer was not ready in time."),
    )
}


class Serving:
    """An engine, its thread and what is counted; the state behind the routes.

    Attributes:
        draining: takes no new requests, as the process is to end.
    """

    def __init__(self, engine: Engine, metrics: Metrics, limits: ServeLimits):
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.thread = EngineThread(engine)
        self.completions = Completions(engine, self.thread, limits)
        self.draining = False
        metrics.watch_state(lambda: self.thread.state)

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True

    def check_open(self) -> None:
        if self.draining:
            raise HttpError(503, SHUTTING_DOWN, headers={"Connection": "close"})

    @property
    def unready(self) -> str:
        """Why no request can be served; "" where it can."""
        if self.thread.failure or self.draining:
            return self.thread.failure or SHUTTING_DOWN
        return "" if self.thread.state.models else "no prefill module is loaded"


def build_app(serving: Serving, admin: bool = False) -> FastAPI:
    """The application; the engine's thread runs for as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.thread.start()
        try:
            yield
        finally:
            await asyncio.to_thread(serving.thread.stop)

    app = FastAPI(title="qsun serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    _add_status_routes(app, serving)
    _add_completion_routes(app, serving)
    if admin:
        add_admin_routes(app, serving.engine, serving.thread)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Errors in OpenAI's words, also those that the framework finds."""

    @app.exception_handler(HttpError)
    async def known(_: Request, error: HttpError) -> Response:
        return Response(error.encoded(), error.status, error.headers, "application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        if found[0]["type"] == "json_invalid":
            return await known(_, HttpError(400, f"the body is no JSON: {found[0]['ctx']['error']}"))
        # of a field that may be of several types, what is wrong with the type that was given
        told = next((one for one in found if not one["type"].endswith(("_type", "_parsing"))), found[0])
        field = str(told["loc"][1]) if len(told["loc"]) > 1 else None
        return await known(_, HttpError(400, f"{field or 'the body'}: {told['msg']}", field))

    @app.exception_handler(HTTPException)
    async def routing(_: Request, error: HTTPException) -> Response:
        return await known(_, HttpError(error.status_code, str(error.detail), headers=error.headers))


def _add_status_routes(app: FastAPI, serving: Serving) -> None:
    started = int(time.time())

    @app.get("/health", responses={503: _ERRORS[500]})
    async def health() -> JSONResponse:
        """Whether the engine lives."""
        failure = serving.thread.failure
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    @app.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> JSONResponse:
        """Whether requests are taken."""
        reason = serving.unready
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", responses={401: _ERRORS[401], 429: _ERRORS[429]})
    async def models() -> dict[str, Any]:
        """Each prefill module is a model."""
        names = [name for name, model in serving.thread.state.models.items() if not model.leaving]
        entries = [{"id": name, "object": "model", "created": started, "owned_by": "qsun"} for name in names]
        return {"object": "list", "data": entries}


def _add_completion_routes(app: FastAPI, serving: Serving) -> None:
    async def answer(body: CompletionBody | ChatBody, http: Request) -> Response:
        serving.check_open()
        reply = await serving.completions.start(body)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(_closed(reply.stream(usage)), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(http, reply.whole()))

    @app.post("/v1/completions", responses=_ERRORS, response_class=JSONResponse)
    async def completions(body: CompletionBody, http: Request) -> Response:
        return await answer(body, http)

    @app.post("/v1/chat/completions", responses=_ERRORS, response_class=JSONResponse)
    async def chat(body: ChatBody, http: Request) -> Response:
        return await answer(body, http)


async def _closed(stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The stream, closed at once where the client leaves, and not when the garbage collector comes by."""
    try:
        async for piece in stream:
            yield piece
    finally:
        await stream.aclose()


async def _unless_gone(http: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The work's result; where the client leaves before, the work is cancelled."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HttpError(499, "the client closed the connection")
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
