"""The router in front of vLLM workers: OpenAI's API for clients, one transfer of KV cache per request behind it."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from qsun.serve.cluster.modules import ServedNames
from qsun.serve.cluster.schema import Cluster, Limits
from qsun.serve.http.admission import Admission
from qsun.serve.http.errors import HttpError
from qsun.serve.http.guard import Guard, Message, Receive, Send
from qsun.serve.router.endpoint import GenerationEndpoint
from qsun.serve.router.exchange.health import HealthChecks
from qsun.serve.router.exchange.metrics import RouterMetrics
from qsun.serve.router.exchange.request import CHAT, COMPLETIONS
from qsun.serve.router.workers.fleet import Fleet

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 2.0  # less than vLLM's 5: a connection that it closes meanwhile would look like a failure


class Router:
    """An ASGI application, with its workers and limits, which `apply` changes while it runs.

    Attributes:
        draining: no new requests; /ready answers 503. cut_off: what is at work ends now, with an error.
    """

    def __init__(self, cluster: Cluster, names: ServedNames, api_keys: tuple[str, ...] = ()):
        limits = cluster.limits
        self.cluster = cluster
        self.fleet = Fleet()
        self.metrics = RouterMetrics()
        self.admission = Admission(limits.concurrent_requests, limits.queued_requests, limits.queue_seconds)
        self.client = _client(limits)
        self.health = HealthChecks(self.client, self.fleet, cluster.health)
        self.draining = False
        self.cut_off = asyncio.Event()
        self._started = int(time.time())
        self.fleet.update(cluster, names)
        self._inner = Starlette(
            routes=self._routes(),
            lifespan=self._lifespan,
            exception_handlers={HttpError: _error_answer, HTTPException: _error_answer},
        )
        self._guard = Guard(self._inner, cluster.guard_config(api_keys))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)

    @property
    def busy(self) -> bool:
        """Whether requests are at work or wait."""
        return bool(self.admission.running or self.admission.waiting)

    def apply(self, cluster: Cluster, names: ServedNames, api_keys: tuple[str, ...]) -> None:
        """Take on another file. Requests in flight keep their workers and their limits.

        Raises:
            QsunError: a key that is not taken; nothing has changed then.
        """
        guard = Guard(self._inner, cluster.guard_config(api_keys))  # first: the only thing here that can fail
        limits = cluster.limits
        self.cluster = cluster
        self.admission.bound(limits.concurrent_requests, limits.queued_requests, limits.queue_seconds)
        self.health.take(cluster.health)
        self.fleet.update(cluster, names)
        self._guard = guard
        self.health.watch()

    def _routes(self) -> list[Route]:
        generate = GenerationEndpoint(self)
        return [
            Route(COMPLETIONS, generate, methods=["POST"]),
            Route(CHAT, generate, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
        ]

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.health.watch()
        try:
            yield
        finally:
            await self.health.stop()
            await self.client.aclose()

    async def _models(self, _: Request) -> Response:
        cards = [
            {"id": model, "object": "model", "created": self._started, "owned_by": "qsun"}
            for model in self.cluster.models
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        """200 once every model has a warm pair of workers; what is missing, and why, in any case."""
        waiting = self.fleet.without_a_pair()
        ready = not waiting and not self.draining
        state = {
            "ready": ready,
            "draining": self.draining,
            "models_without_workers": waiting,
            "warm_pairs": len(self.fleet.warm),
            "workers": [self._worker_state(worker) for worker in self.fleet],
        }
        return JSONResponse(state, status_code=200 if ready else 503)

    def _worker_state(self, worker: Any) -> dict[str, Any]:
        return {
            "url": worker.url,
            "role": worker.role,
            "model": worker.model,
            "state": worker.state,
            "circuit": worker.breaker.state,
            "reason": worker.reason,
            "in_flight": worker.in_flight,
            "outstanding_tokens": worker.outstanding_tokens,
            "warm_with": sorted(pair[worker.role == "prefill"] for pair in self.fleet.warm if worker.url in pair),
        }

    async def _metrics(self, _: Request) -> Response:
        self.metrics.in_flight.set(self.admission.running)
        self.metrics.queued.set(self.admission.waiting)
        return PlainTextResponse(self.metrics.render(self.fleet), media_type="text/plain; version=0.0.4")


async def _error_answer(_: Request, error: Exception) -> Response:
    """Errors in OpenAI's words, those of Starlette (no such path or method) too."""
    if isinstance(error, HTTPException):
        error = HttpError(error.status_code, error.detail)
    assert isinstance(error, HttpError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _client(limits: Limits) -> httpx.AsyncClient:
    """Connections to workers: bounded, no redirects, no proxy out of the environment."""
    at_once = 2 * limits.concurrent_requests + 64
    bounds = httpx.Limits(max_connections=at_once, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE_SECONDS)
    transport = httpx.AsyncHTTPTransport(limits=bounds, trust_env=False, socket_options=_dead_peer_options())
    return httpx.AsyncClient(transport=transport, trust_env=False, follow_redirects=False)


def _dead_peer_options() -> list[tuple[int, int, int]]:
    """Have the kernel ask after a peer that says nothing, so that a machine that is gone breaks a connection."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):  # gone after 25 seconds
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
