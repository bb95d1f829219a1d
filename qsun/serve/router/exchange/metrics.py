"""Prometheus metrics of the router, in their own registry. Labels come from the cluster file, never from clients."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qsun.serve.router.workers.fleet import Fleet

_TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
_TPOT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_STATES = ("unchecked", "ready", "refused", "down")


class RouterMetrics:
    """Counters that the router increments, and gauges that are computed from the fleet when scraped."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        every: Any = {"registry": registry}
        by_model, by_worker = every | {"labelnames": ["model"]}, every | {"labelnames": ["url", "role"]}
        self.requests = Counter("qsun_router_requests", "Requests by outcome", ["model", "outcome"], **every)
        self.retries = Counter("qsun_router_retries", "Attempts that failed, by cause", ["cause"], **every)
        missing = "Prefills without transfer parameters"
        self.missing_transfers = Counter("qsun_router_missing_transfer_params", missing, **by_model)
        self.prompt_tokens = Counter("qsun_router_prompt_tokens", "Prompt tokens", **by_model)
        self.tokens = Counter("qsun_router_generated_tokens", "Tokens passed to clients", **by_model)
        first, between = "Time to the first event of a stream", "Time between tokens of a stream"
        self.ttft = Histogram("qsun_router_ttft_seconds", first, buckets=_TTFT_SECONDS, **by_model)
        self.tpot = Histogram("qsun_router_tpot_seconds", between, buckets=_TPOT_SECONDS, **by_model)
        self.in_flight = Gauge("qsun_router_in_flight", "Running requests", **every)
        self.queued = Gauge("qsun_router_queued", "Waiting requests", **every)
        self.reloads = Counter("qsun_router_reloads", "Reloads of the cluster file", ["outcome"], **every)
        states = ["url", "role", "state"]
        self._state = Gauge("qsun_router_worker_state", "1 for the current state", states, **every)
        self._circuit = Gauge("qsun_router_circuit_open", "1 if the circuit is not closed", **by_worker)
        self._outstanding = Gauge("qsun_router_outstanding_tokens", "Tokens not yet computed", **by_worker)
        self._at_worker = Gauge("qsun_router_worker_in_flight", "Requests at a worker", **by_worker)
        self._warm = Gauge("qsun_router_warm_pairs", "Warm pairs of workers", **every)

    def render(self, fleet: Fleet) -> bytes:
        """Return the text that Prometheus scrapes."""
        for gauge in (self._state, self._circuit, self._outstanding, self._at_worker):
            gauge.clear()  # workers may have left
        for worker in fleet:
            labels = (worker.url, worker.role)
            for state in _STATES:
                self._state.labels(*labels, state).set(worker.state == state)
            self._circuit.labels(*labels).set(worker.breaker.state != "closed")
            self._outstanding.labels(*labels).set(worker.outstanding_tokens)
            self._at_worker.labels(*labels).set(worker.in_flight)
        self._warm.set(len(fleet.warm))
        return generate_latest(self.registry)
