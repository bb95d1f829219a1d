"""The report's numbers against ones computed by hand, and its pages."""

import math
from html.parser import HTMLParser

import pytest
import torch

from qsun.eval.report.pages import markdown, page, tables
from qsun.eval.report.plots import draw_plots
from qsun.eval.report.summary import provenance, summarize
from qsun.eval.report.variants import Entry, Matrix

MATRIX = Matrix((Entry("SUN", "demo", "demo"), Entry("QSUN <int4>", "demo", "demo")), ("a", "b"), "SUN")


def task(variant, name, values):
    return {"kind": "task", "variant": variant, "task": name, "values": values}


def parts():
    found = {"positions": 10, "mean_kl": 0.1, "p99_kl": 0.5, "top1": 0.9, "loss": 1.0, "reference_loss": 0.9}
    more = found | {"positions": 30, "mean_kl": 0.3, "p99_kl": 0.4}
    return [
        task("SUN", "a", [1, 1, 1, 0]),
        task("SUN", "b", [1, 0]),
        task("QSUN <int4>", "a", [1, 0, 0, 1]),
        task("QSUN <int4>", "b", [1, 0]),
        {"kind": "responses", "variant": "SUN", "source": "x", **found},
        {"kind": "responses", "variant": "SUN", "source": "y", **more},
        {"kind": "text", "variants": ["SUN", "QSUN <int4>"], "decode": "demo", "source": "x", **found},
    ]


def report():
    rows = [
        {
            "variant": v,
            "lm_head": "bf16",
            "batch": b,
            "context": 128,
            "ttft_ms": 1.0,
            "tpot_ms": 2.0,
            "tpot_p95_ms": 3.0,
            "tokens_per_s": 4.0,
            "ratio_to_sun": 1.5,
            "bandwidth_percent": 50.0,
            "weight_bytes": 10**9,
            "kv_bytes": 10**8,
            "floor_ms": 1.0,
        }
        for v in ("sun", "qsun")
        for b in (1, 4)
    ]
    speed = {"model": "m", "machine": "c", "rows": rows}
    return summarize(MATRIX, parts()) | {
        "provenance": provenance("qsun eval <x>", 3, torch.device("cpu")),
        "settings": {},
        "speed": speed,
    }


def test_rates_errors_and_comparisons():
    found = summarize(MATRIX, parts())
    a, mean = found["accuracy"]["a"], found["accuracy"]["mean"]
    assert a["SUN"]["rate"] == 0.75 and a["SUN"]["stderr"] == pytest.approx(math.sqrt(0.75 / 3 / 4))
    assert "difference" not in a["SUN"]
    ours = a["QSUN <int4>"]
    assert (ours["difference"], ours["only_a"], ours["only_b"], ours["p_value"]) == (-0.25, 2, 1, 1.0)
    assert mean["SUN"]["rate"] == pytest.approx((0.75 + 0.5) / 2), "the mean is that of the tasks"
    assert mean["SUN"]["stderr"] == pytest.approx(math.sqrt(0.75 / 12 + 0.5 / 2) / 2)
    assert mean["QSUN <int4>"]["difference"] == pytest.approx(-0.25 / 2), "and so is the difference"
    assert found["sentences"][0].startswith("QSUN <int4> is 12.5 points below SUN (95% CI ")
    pooled = found["responses"]["SUN"]
    assert pooled["positions"] == 40 and pooled["mean_kl"] == pytest.approx(0.25) and pooled["p99_kl"] == 0.5
    assert found["text"]["QSUN <int4>"]["top1"] == 0.9


def test_a_metric_that_is_no_yes_or_no_is_not_compared_as_one():
    rows = [task("SUN", "a", [0.5, 1]), task("QSUN <int4>", "a", [0.25, 1])]
    assert "difference" not in summarize(MATRIX, rows)["accuracy"]["a"]["QSUN <int4>"]


def test_variants_that_share_no_task_have_no_mean():
    """Nor a sentence that would not say which task it is about."""
    found = summarize(MATRIX, [task("SUN", "a", [1, 0]), task("QSUN <int4>", "b", [1, 1])])
    assert list(found["accuracy"]) == ["a", "b"] and found["sentences"] == []


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.cells = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        self.cells += tag == "td"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_hold_every_number_and_need_nothing_else():
    made = report()
    pictures = draw_plots(made)
    assert set(pictures) == {"accuracy", "speed"} and all(png.startswith(b"\x89PNG") for png in pictures.values())
    text = page(made, pictures)
    reader = Reader()
    reader.feed(text)
    assert not reader.open and reader.cells == sum(len(row) for table in tables(made).values() for row in table.rows)
    assert len(reader.sources) == 2 and all(source.startswith("data:image/png") for source in reader.sources)
    assert "<int4>" not in text and "&lt;int4&gt;" in text and "&lt;x&gt;" in text
    plain = markdown(made, list(pictures))
    for cell in ("75.0 ± 25.0", "-12.5", "$ qsun eval <x>", "![Accuracy by task", "250.000"):
        assert cell in plain, cell
    for table in tables(made).values():
        assert all(cell in plain for row in table.rows for cell in row)
