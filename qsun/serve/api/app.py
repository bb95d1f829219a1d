"""The HTTP side of the in-process engine: OpenAI's API, health, readiness, metrics, and optional administration."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from qsun._version import __version__
from qsun.adapters.adapter_module import AdapterLibrary
from qsun.engine.engine import Engine
from qsun.engine.thread import SHUTTING_DOWN, EngineThread
from qsun.engine.warming import warm
from qsun.serve.api.admin import add_admin_routes
from qsun.serve.api.completions import Completions, ServeLimits
from qsun.serve.api.errors import DESCRIBED, add_error_handlers
from qsun.serve.api.generation import add_generation_routes
from qsun.serve.api.json_route import JsonRoute
from qsun.serve.api.metrics import Metrics
from qsun.serve.api.tokens import add_token_routes
from qsun.serve.http.errors import HttpError


class Serving:
    """An engine, its thread and its metrics; the state behind the routes.

    Args:
        library: opens the adapters that are added while it runs, and has opened those that the engine serves already.

    Attributes:
        draining: new requests are refused, because the process is about to end.
    """

    def __init__(self, engine: Engine, metrics: Metrics, limits: ServeLimits, library: AdapterLibrary | None = None):
        self.library = library or AdapterLibrary(engine.decode)
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.thread = EngineThread(engine)
        self.completions = Completions(engine, self.thread, limits)
        self.draining = False
        metrics.watch_state(lambda: self.thread.state)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    def check_open(self) -> None:
        if self.draining:
            raise HttpError(503, SHUTTING_DOWN, headers={"Connection": "close"})

    @property
    def unready(self) -> str:
        """Why no request can be served; "" where it can."""
        if self.thread.failure or self.draining:
            return self.thread.failure or SHUTTING_DOWN
        return "" if self.models else "no prefill module is loaded"

    @property
    def models(self) -> list[str]:
        return [name for name, model in self.thread.state.models.items() if not model.leaving]


def build_app(serving: Serving, admin: bool = False) -> FastAPI:
    """Return the application; the engine's thread runs for as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(warm, serving.engine)  # no request waits for a compiler
        serving.thread.start()
        try:
            yield
        finally:
            await asyncio.to_thread(serving.thread.stop)

    app = FastAPI(title="qsun serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    add_error_handlers(app)
    _add_status_routes(app, serving)
    _add_model_routes(app, serving)
    add_generation_routes(app, serving.completions, serving.check_open)
    add_token_routes(app, serving.completions.prompts)
    if admin:
        add_admin_routes(app, serving.engine, serving.thread, serving.library)
    return app


def _add_status_routes(app: FastAPI, serving: Serving) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: DESCRIBED[500]})
    async def health() -> JSONResponse:
        """Whether the engine is alive."""
        failure = serving.thread.failure
        return JSONResponse({"status": failure or "ok"}, 503 if failure else 200)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: DESCRIBED[503]})
    async def ready() -> JSONResponse:
        """Whether requests are accepted."""
        reason = serving.unready
        return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _add_model_routes(app: FastAPI, serving: Serving) -> None:
    started = int(time.time())
    errors: dict[int | str, dict[str, Any]] = {status: DESCRIBED[status] for status in (401, 404, 429)}

    def card(name: str) -> dict[str, Any]:
        length = serving.engine.positions
        return {"id": name, "object": "model", "created": started, "owned_by": "qsun", "max_model_len": length}

    @app.get("/v1/models", responses={401: errors[401], 429: errors[429]})
    async def models() -> dict[str, Any]:
        """Each prefill module is a model."""
        return {"object": "list", "data": [card(name) for name in serving.models]}

    @app.get("/v1/models/{name:path}", responses=errors)
    async def model(name: str) -> dict[str, Any]:
        """One model; its name may contain slashes."""
        if name not in serving.models:
            known = ", ".join(serving.models) or "(none)"
            raise HttpError(404, f"model {name!r} is not served; models are {known}", "model", code="model_not_found")
        return card(name)
