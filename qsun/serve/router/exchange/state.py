"""What a running router shares: its cluster, workers, limits and counters, and whether it is shutting down."""

import asyncio
import socket

import httpx

from qsun.serve.cluster.modules import ServedNames
from qsun.serve.cluster.schema import Cluster, RequestLimits
from qsun.serve.http.admission import Admission
from qsun.serve.router.exchange.health import HealthChecks
from qsun.serve.router.exchange.metrics import RouterMetrics
from qsun.serve.router.workers.fleet import Fleet

_KEEP_ALIVE_SECONDS = 2.0  # less than vLLM's 5: a connection that it closes meanwhile would look like a failure


class RouterState:
    """Everything of a router but its HTTP side.

    Attributes:
        draining: no new requests; /ready answers 503.
        cut_off: set to end the requests in flight now, with an error.
    """

    def __init__(self, cluster: Cluster, names: ServedNames):
        limits = cluster.limits
        self.cluster = cluster
        self.fleet = Fleet()
        self.metrics = RouterMetrics()
        self.admission = Admission(limits.concurrent_requests, limits.queued_requests, limits.queue_seconds)
        self.client = _client(limits)
        self.health = HealthChecks(self.client, self.fleet, cluster.health)
        self.draining = False
        self.cut_off = asyncio.Event()
        self.fleet.update(cluster, names)

    @property
    def busy(self) -> bool:
        """Whether requests are in flight or wait."""
        return bool(self.admission.running or self.admission.waiting)

    def apply(self, cluster: Cluster, names: ServedNames) -> None:
        """Take on another file. Requests in flight keep their workers and their limits."""
        limits = cluster.limits
        self.cluster = cluster
        self.admission.bound(limits.concurrent_requests, limits.queued_requests, limits.queue_seconds)
        self.health.take(cluster.health)
        self.fleet.update(cluster, names)
        self.health.watch()


def _client(limits: RequestLimits) -> httpx.AsyncClient:
    """Connections to workers: bounded, no redirects, no proxy out of the environment."""
    at_once = 2 * limits.concurrent_requests + 64
    bounds = httpx.Limits(max_connections=at_once, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE_SECONDS)
    transport = httpx.AsyncHTTPTransport(limits=bounds, trust_env=False, socket_options=_keep_alive_options())
    return httpx.AsyncClient(transport=transport, trust_env=False, follow_redirects=False)


def _keep_alive_options() -> list[tuple[int, int, int]]:
    """TCP keep-alive: the kernel probes a silent peer, so that a machine that fails breaks its connections."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):  # 25 seconds in all
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
