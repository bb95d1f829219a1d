"""OpenTelemetry spans over a request: `request`, and for each attempt `prefill` and `decode`.

The transfer of KV cache is the part of `decode` before its event `first token`. Workers get the span's context in
`traceparent`, so vLLM's own spans are inside. Without opentelemetry, and without a configured SDK, all this does
nothing; `opentelemetry-instrument qsun route ...` configures one.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    propagate = trace = None  # type: ignore[assignment]


@contextmanager
def request_span(headers: Iterable[tuple[bytes, bytes]], **attributes: str) -> Iterator[None]:
    """Have a span of a request within the block, in the client's trace if its headers name one."""
    if trace is None:
        yield
        return
    carried = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
    parent = propagate.extract(carried)
    with _tracer().start_as_current_span("request", parent, trace.SpanKind.SERVER, _named(attributes)):
        yield


@contextmanager
def worker_span(name: str, **attributes: str | int) -> Iterator[None]:
    """Have a span of what a worker does within the block."""
    if trace is None:
        yield
        return
    with _tracer().start_as_current_span(name, kind=trace.SpanKind.CLIENT, attributes=_named(attributes)):
        yield


def mark(event: str) -> None:
    """Note an event in the current span."""
    if trace is not None:
        trace.get_current_span().add_event(event)


def with_trace(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers with the current span's context."""
    carried = dict(headers)
    if propagate is not None:
        propagate.inject(carried)
    return carried


def _tracer() -> Any:
    return trace.get_tracer("qsun")


def _named(attributes: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"qsun.{name}": value for name, value in attributes.items()}
