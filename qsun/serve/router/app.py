"""The router in front of vLLM workers: OpenAI's API for clients, one KV transfer for each request behind it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qsun.serve.cluster.names import ServedNames
from qsun.serve.cluster.schema import Cluster
from qsun.serve.http.errors import HttpError
from qsun.serve.http.guard import Guard
from qsun.serve.router.endpoint import GenerationEndpoint
from qsun.serve.router.exchange.request import CHAT, COMPLETIONS
from qsun.serve.router.exchange.state import RouterState

_READY_ANY = "/ready/any"


class Router:
    """An ASGI application. `state` is what it serves from; `apply` changes it while it runs.

    Args:
        transport: that reaches the workers; None: HTTP.
        beside: runs beside the router from its start to its end.
    """

    def __init__(
        self,
        cluster: Cluster,
        names: ServedNames,
        api_keys: tuple[str, ...] = (),
        transport: httpx.AsyncBaseTransport | None = None,
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ):
        self.state = RouterState(cluster, names, transport)
        self._beside = beside
        self._started = int(time.time())
        self._inner = Starlette(
            routes=self._routes(),
            lifespan=self._lifespan,
            exception_handlers={HttpError: _error_answer, HTTPException: _error_answer},
        )
        self._guard = Guard(self._inner, cluster.guard_config(api_keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)

    def apply(self, cluster: Cluster, names: ServedNames, api_keys: tuple[str, ...]) -> None:
        """Apply another file. Running requests keep their workers and their limits.

        Raises:
            QsunError: an invalid key; nothing has changed then.
        """
        guard = Guard(self._inner, cluster.guard_config(api_keys))  # first: the only thing here that can fail
        self.state.apply(cluster, names)
        self._guard = guard

    def use_keys(self, api_keys: tuple[str, ...]) -> None:
        """Take other API keys from the next request on. Raises QsunError for an invalid one; nothing has changed."""
        self._guard = Guard(self._inner, self.state.cluster.guard_config(api_keys))

    def _routes(self) -> list[Route]:
        generate = GenerationEndpoint(self.state)
        return [
            Route(COMPLETIONS, generate, methods=["POST"]),
            Route(CHAT, generate, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route(_READY_ANY, self._ready),
            Route("/metrics", self._metrics),
        ]

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.state.health.watch()
        beside = None if self._beside is None else asyncio.create_task(self._beside())
        try:
            yield
        finally:
            if beside is not None:
                beside.cancel()
                await asyncio.wait([beside])
            await self.state.health.stop()
            await self.state.client.aclose()

    async def _models(self, _: Request) -> Response:
        cards = [self._card(model) for model in self.state.cluster.models]
        return JSONResponse({"object": "list", "data": cards})

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        if model not in self.state.cluster.models:
            raise HttpError(404, f"model {model!r:.100} is not served", param="model")
        return JSONResponse(self._card(model))

    def _card(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._started, "owned_by": "qsun"}

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """200 once every model has a warm pair of workers, at /ready/any once one has; the body says what is missing.

        A load balancer asks the second: one model without workers must not take the router from the others' clients.
        """
        waiting = self.state.fleet.without_a_pair()
        enough = len(waiting) < len(self.state.fleet.prefill) if request.url.path == _READY_ANY else not waiting
        ready = enough and not self.state.draining
        state = {
            "ready": ready,
            "draining": self.state.draining,
            "models_without_workers": waiting,
            "warm_pairs": len(self.state.fleet.warm),
            "workers": [self._worker_state(worker) for worker in self.state.fleet],
        }
        return JSONResponse(state, status_code=200 if ready else 503)

    def _worker_state(self, worker: Any) -> dict[str, Any]:
        return {
            "url": worker.url,
            "role": worker.role,
            "model": worker.model,
            "adapters": sorted(worker.adapters),
            "lacking": sorted(worker.lacking),
            "state": worker.state,
            "circuit": worker.breaker.state,
            "suspected": worker.suspected,
            "reason": worker.reason,
            "in_flight": worker.in_flight,
            "outstanding_tokens": worker.outstanding_tokens,
            "warm_with": sorted(pair[worker.role == "prefill"] for pair in self.state.fleet.warm if worker.url in pair),
        }

    async def _metrics(self, _: Request) -> Response:
        self.state.metrics.in_flight.set(self.state.admission.running)
        self.state.metrics.queued.set(self.state.admission.waiting)
        return PlainTextResponse(self.state.metrics.render(self.state.fleet), media_type="text/plain; version=0.0.4")


async def _error_answer(_: Request, error: Exception) -> Response:
    """Return an error in OpenAI's format, also for those of Starlette (no such path or method)."""
    if isinstance(error, HTTPException):
        error = HttpError(error.status_code, error.detail)
    assert isinstance(error, HttpError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
