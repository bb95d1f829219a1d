"""Prometheus metrics of the server, in a registry of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qsun.engine.requests import Request
from qsun.engine.state import EngineState, EngineWatch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(EngineWatch):
    """Counts what the engine reports. Labels are the names of prefill modules, of which there are few."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        by_model: Any = {"labelnames": ["model"], "registry": registry}
        timed: Any = {"registry": registry, "buckets": _SECONDS}
        timed_by_model = by_model | timed
        self._requests = Counter("qsun_requests", "Finished requests.", ["model", "outcome"], registry=registry)
        self._refused = Counter("qsun_requests_refused", "Requests refused because the queue was full.", **by_model)
        self._prompt = Counter("qsun_prompt_tokens", "Prompt tokens of admitted requests.", **by_model)
        self._generated = Counter("qsun_generated_tokens", "Output tokens.", **by_model)
        self._queued = Histogram("qsun_queue_seconds", "Time from arrival to admission.", **timed_by_model)
        self._ttft = Histogram("qsun_ttft_seconds", "Time from arrival to the first token.", **timed_by_model)
        tpot = "Mean time per output token after the first, by finished request."
        self._tpot = Histogram("qsun_tpot_seconds", tpot, **timed_by_model)
        self._rows = Histogram("qsun_decode_batch_rows", "Rows in a decode step.", registry=registry, buckets=_ROWS)
        self._step = Histogram("qsun_decode_step_seconds", "Duration of a decode step.", **timed)
        self._prefill = Counter("qsun_prefill_seconds", "Time spent in prefill.", registry=registry)
        self._first: dict[str, float] = {}

    def watch_state(self, state: Callable[[], EngineState]) -> None:
        """Export the engine's state at each scrape."""
        self.registry.register(_StateCollector(state))

    def refused(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._refused.labels(request.model).inc()

    def admitted(self, request: Request, seconds: float) -> None:
        self._prompt.labels(request.model).inc(len(request.tokens))
        self._queued.labels(request.model).observe(seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        self._prefill.inc(seconds)

    def step(self, rows: int, seconds: float) -> None:
        self._rows.observe(rows)
        self._step.observe(seconds)

    def token(self, request: Request, count: int, seconds: float) -> None:
        self._generated.labels(request.model).inc()
        if count == 1:
            self._first[request.id] = seconds
            self._ttft.labels(request.model).observe(seconds)

    def finished(self, request: Request, outcome: str, tokens: int, seconds: float) -> None:
        self._requests.labels(request.model, outcome).inc()
        first = self._first.pop(request.id, None)
        if first is not None and tokens > 1:
            self._tpot.labels(request.model).observe((seconds - first) / (tokens - 1))

    def removed(self, model: str) -> None:
        """Forget a model's series, so that models which come and go do not add up."""
        for metric in (self._requests, self._refused, self._prompt, self._generated):
            metric.remove_by_labels({"model": model})
        for timed in (self._queued, self._ttft, self._tpot):
            timed.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _StateCollector(Collector):
    def __init__(self, state: Callable[[], EngineState]):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        gauges = {
            field: GaugeMetricFamily(f"qsun_{name}", text, labels=["model"])
            for field, name, text in (
                ("waiting", "requests_waiting", "Requests in the queue."),
                ("prefilling", "requests_prefilling", "Requests being prefilled."),
                ("decoding", "requests_decoding", "Rows of the decode batch."),
                ("kv_tokens", "kv_tokens", "Tokens of KV in use."),
            )
        }
        for name, model in state.models.items():
            for field, gauge in gauges.items():
                gauge.add_metric([name], getattr(model, field))
        yield from gauges.values()
        for kind, name, text, value in (
            (GaugeMetricFamily, "kv_budget_tokens", "Largest number of KV tokens.", state.kv_budget_tokens),
            (GaugeMetricFamily, "prefix_cache_bytes", "Bytes held by the prefix cache.", state.prefix_bytes),
            (CounterMetricFamily, "prefix_cache_hit_tokens", "Prompt tokens found in it.", state.prefix_hits),
            (CounterMetricFamily, "prefix_cache_lookup_tokens", "Prompt tokens looked up.", state.prefix_lookups),
            (GaugeMetricFamily, "adapters", "LoRA adapters in memory.", state.adapters),
            (GaugeMetricFamily, "adapter_bytes", "Bytes of the adapters in memory.", state.adapter_bytes),
            (CounterMetricFamily, "adapter_loads", "Adapters read from disk.", state.adapter_loads),
            (CounterMetricFamily, "adapter_evictions", "Adapters evicted to make room.", state.adapter_evictions),
            (CounterMetricFamily, "spec_decode_draft_tokens", "Tokens drafted.", state.drafted),
            (CounterMetricFamily, "spec_decode_accepted_tokens", "Drafted tokens that were right.", state.accepted),
        ):
            yield kind(f"qsun_{name}", text, value=value)
