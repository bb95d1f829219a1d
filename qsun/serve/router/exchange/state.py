"""What a running router shares: its cluster, workers, limits and counters, and whether it is shutting down."""

import asyncio
import socket

import httpx

from qsun.serve.cluster.names import ServedNames
from qsun.serve.cluster.schema import Cluster, RequestLimits
from qsun.serve.router.exchange.admission import Admission
from qsun.serve.router.exchange.health import HealthChecks
from qsun.serve.router.exchange.metrics import RouterMetrics
from qsun.serve.router.workers.fleet import Fleet

_KEEP_ALIVE_SECONDS = 2.0  # less than vLLM's 5: a connection that it closes meanwhile would look like a failure


class RouterState:
    """Everything that a router has besides its HTTP side.

    Args:
        transport: that reaches the workers; None: HTTP.
    Attributes:
        draining: new requests and /ready get 503.
        cut_off: set to end running requests now, with an error.
    """

    def __init__(self, cluster: Cluster, names: ServedNames, transport: httpx.AsyncBaseTransport | None = None):
        limits = cluster.limits
        self.cluster = cluster
        self.fleet = Fleet()
        self.metrics = RouterMetrics()
        self.admission = Admission(limits.concurrent_requests, limits.queued_requests, limits.queue_seconds)
        self.client = httpx.AsyncClient(transport=transport or _http(limits), trust_env=False, follow_redirects=False)
        self.health = HealthChecks(self.client, self.fleet, cluster.health)
        self.draining = False
        self.cut_off = asyncio.Event()
        self.fleet.update(cluster, names)

    @property
    def busy(self) -> bool:
        """Whether requests run or wait."""
        return bool(self.admission.running or self.admission.waiting)

    def apply(self, cluster: Cluster, names: ServedNames) -> None:
        """Apply another file. Running requests keep their workers and their limits."""
        limits = cluster.limits
        self.cluster = cluster
        self.admission.limit(limits.concurrent_requests, limits.queued_requests, limits.queue_seconds)
        self.health.configure(cluster.health)
        self.fleet.update(cluster, names)
        self.health.watch()


def _http(limits: RequestLimits) -> httpx.AsyncHTTPTransport:
    """Return a transport to workers: bounded connections, no proxy from the environment."""
    at_once = 2 * limits.concurrent_requests + 64
    bounds = httpx.Limits(max_connections=at_once, max_keepalive_connections=64, keepalive_expiry=_KEEP_ALIVE_SECONDS)
    return httpx.AsyncHTTPTransport(limits=bounds, trust_env=False, socket_options=_keep_alive_options())


def _keep_alive_options() -> list[tuple[int, int, int]]:
    """Return options by which a failed machine breaks its connections within 25 seconds.

    The kernel probes a silent peer, but not while it waits for the peer to acknowledge data, which has its own limit.
    """
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    probes = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    for name, value in (*probes, ("TCP_USER_TIMEOUT", 25_000)):  # in seconds, and the last one in milliseconds
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options
