"""The Grafana dashboard asks for metrics that the router has, by labels that they have."""

import json
import re

from qsun.serve.router.exchange.metrics import RouterMetrics
from qsun.serve.router.workers.fleet import Fleet
from qsun.serve.router.workers.worker import Breaker, Worker
from tests.places import ROOT

EXPRESSIONS = [
    (target["expr"], target["legendFormat"])
    for panel in json.loads((ROOT / "docs/grafana/qsun.json").read_text())["panels"]
    for target in panel["targets"]
]


def labels_of_metrics():
    """Labels by the name of each sample, once something has happened."""
    metrics, fleet = RouterMetrics(), Fleet()
    fleet.decode = [Worker("http://a:1", "decode", "d", Breaker(3, 1.0))]
    metrics.requests.labels("math", "ok").inc()
    metrics.retries.labels("connect").inc()
    for metric in (metrics.prompt_tokens, metrics.tokens):
        metric.labels("math").inc()
    for metric in (metrics.ttft, metrics.tpot):
        metric.labels("math").observe(1.0)
    metrics.render(fleet)
    return {sample.name: set(sample.labels) for metric in metrics.registry.collect() for sample in metric.samples}


def test_every_panel_finds_its_metric():
    known = labels_of_metrics()
    asked = {name for expression, _ in EXPRESSIONS for name in re.findall(r"qsun_\w+", expression)}
    assert len(asked) > 10
    assert asked <= set(known)


def test_labels_exist():
    known = labels_of_metrics()
    for expression, legend in EXPRESSIONS:
        names = re.findall(r"qsun_\w+", expression)
        wanted = set(re.findall(r"{{(\w+)}}", legend))
        grouped = {label for by in re.findall(r"by \(([\w, ]+)\)", expression) for label in by.split(", ")}
        for name in names:
            assert wanted | grouped <= known[name], expression
