"""Prometheus metrics of the router, in their own registry. Labels come from the cluster file, never from clients."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qsun.serve.router.workers.fleet import Fleet

_TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
_TPOT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_STATES = ("unchecked", "ready", "refused", "down")


class RouterMetrics:
    """Counters that the router increments, and gauges that are computed from the fleet when scraped."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        model, ttft, tpot = ["model"], _TTFT_SECONDS, _TPOT_SECONDS
        self.requests = Counter(
            "qsun_router_requests", "Requests by model and outcome", ["model", "outcome"], registry=registry
        )
        self.retries = Counter("qsun_router_retries", "Attempts that failed, by cause", ["cause"], registry=registry)
        self.missing_transfers = Counter(
            "qsun_router_missing_transfer_params",
            "Prefills without transfer parameters",
            model,
            registry=registry,
        )
        self.prompt_tokens = Counter("qsun_router_prompt_tokens", "Prompt tokens", model, registry=registry)
        self.tokens = Counter("qsun_router_generated_tokens", "Tokens passed to clients", model, registry=registry)
        self.ttft = Histogram(
            "qsun_router_ttft_seconds",
            "Time to the first event of a stream",
            model,
            buckets=ttft,
            registry=registry,
        )
        self.tpot = Histogram(
            "qsun_router_tpot_seconds", "Time between tokens of a stream", model, buckets=tpot, registry=registry
        )
        self.in_flight = Gauge("qsun_router_in_flight", "Running requests", registry=registry)
        self.queued = Gauge("qsun_router_queued", "Waiting requests", registry=registry)
        self.reloads = Counter("qsun_router_reloads", "Reloads of the cluster file", ["outcome"], registry=registry)
        worker = ["url", "role"]
        self._state = Gauge(
            "qsun_router_worker_state", "1 for the current state", [*worker, "state"], registry=registry
        )
        self._circuit = Gauge("qsun_router_circuit_open", "1 if the circuit is not closed", worker, registry=registry)
        self._outstanding = Gauge(
            "qsun_router_outstanding_tokens", "Tokens not yet computed", worker, registry=registry
        )
        self._at_worker = Gauge("qsun_router_worker_in_flight", "Requests at a worker", worker, registry=registry)
        self._warm = Gauge("qsun_router_warm_pairs", "Warm pairs of workers", registry=registry)

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
