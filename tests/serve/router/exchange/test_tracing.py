"""Spans of a request through the router: one trace from the client to both workers."""

import pytest

from tests.serve.routing import rig, run

pytest.importorskip("opentelemetry.sdk", reason="pip install opentelemetry-sdk")

from opentelemetry.sdk import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from qsun.serve.router.exchange import tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-Id": "mine"}


@pytest.fixture
def spans(monkeypatch):
    """The spans that have ended, by name, from a provider that is this test's own."""
    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", lambda: provider.get_tracer("test"))

    def ended():
        return {
            span.name: span for span in exporter.get_finished_spans() if format(span.context.trace_id, "032x") == TRACE
        }

    return ended


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_trace(spans, stream):
    async def scenario():
        async with rig(decode=1) as made:
            body = {"model": "math", "prompt": "a b c d", "max_tokens": 3, "stream": stream}
            await made.client.post("/v1/completions", json=body, headers=CLIENT)
            return [dict(worker.seen[-1]["headers"]) for worker in (made.prefill["math"][0], made.decode[0])]

    headers = run_for(scenario)
    found = spans()
    assert set(found) == {"request", "prefill", "decode"}
    assert found["request"].attributes == {"qsun.model": "math", "qsun.request_id": "mine"}
    for name, seen in zip(("prefill", "decode"), headers, strict=True):
        assert found[name].parent.span_id == found["request"].context.span_id
        parent = format(found[name].context.span_id, "016x")
        assert seen[b"traceparent"].decode() == f"00-{TRACE}-{parent}-01"
    assert [event.name for event in found["decode"].events] == (["first token"] if stream else [])
    assert found["prefill"].end_time <= found["decode"].start_time


def run_for(scenario):
    """Run a scenario and return what it gives."""
    given = []

    async def kept():
        given.append(await scenario())

    run(kept)
    return given[0]
