"""Traces: Poisson gaps, Zipf shares, lengths as asked for, the same draws for the same seed."""

import itertools
import json
import math
import statistics

import pytest
from scipy import stats

from qsun.errors import QsunError
from qsun.eval.load.workload import Lengths, TracedRequest, Workload, read_trace, zipf_shares

MODELS = ("a", "b", "c", "d")


def workload(skew=1.0, prompt="fixed:10", output="fixed:5", seed=0):
    return Workload(MODELS, skew, Lengths.parse(prompt), Lengths.parse(output), seed)


def test_zipf_shares_by_hand():
    assert zipf_shares(MODELS, 0) == dict.fromkeys(MODELS, 0.25)
    shares = zipf_shares(("a", "b", "c"), 1)
    assert shares == pytest.approx({"a": 6 / 11, "b": 3 / 11, "c": 2 / 11})
    assert zipf_shares(("a", "b"), 2) == pytest.approx({"a": 0.8, "b": 0.2})


@pytest.mark.parametrize("skew", [0.0, 1.0, 1.7])
def test_models_are_drawn_by_their_shares(skew):
    trace = workload(skew).trace(1.0, 8000)
    observed = [sum(request.model == model for request in trace) for model in MODELS]
    expected = [8000 * share for share in zipf_shares(MODELS, skew).values()]
    assert stats.chisquare(observed, expected).pvalue > 0.001


def test_gaps_are_exponential_with_the_rate():
    trace = workload().trace(20.0, 8000)
    gaps = [trace[0].arrival, *(b.arrival - a.arrival for a, b in itertools.pairwise(trace))]
    assert stats.kstest(gaps, "expon", args=(0, 1 / 20)).pvalue > 0.001
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)


def test_an_infinite_rate_has_all_at_once():
    assert {request.arrival for request in workload().trace(math.inf, 5)} == {0.0}


def test_lengths_are_distributed_as_asked():
    trace = workload(prompt="uniform:3-7", output="lognormal:200,0.5").trace(1.0, 6000)
    observed = [sum(request.prompt_tokens == n for request in trace) for n in range(3, 8)]
    assert sum(observed) == 6000
    assert stats.chisquare(observed).pvalue > 0.001
    logs = [math.log(request.output_tokens) for request in trace]
    assert statistics.median(logs) == pytest.approx(math.log(200), abs=0.03)
    assert statistics.stdev(logs) == pytest.approx(0.5, abs=0.03)


def test_lengths_end_where_they_are_cut():
    trace = workload(output="lognormal:200,1.5,250").trace(1.0, 500)
    assert max(request.output_tokens for request in trace) == 250
    assert min(request.output_tokens for request in trace) >= 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "fixed", "fixed:0", "fixed:x", "fixed:99999999", "uniform:7-3", "uniform:5", "zipf:3"),
        *("lognormal:10", "lognormal:10,-1", "lognormal:10,1,5", "lognormal:10,1,50,2"),
    ],
)
def test_lengths_that_are_none(text):
    with pytest.raises(QsunError, match="use fixed:N, uniform:A-B or lognormal"):
        Lengths.parse(text)


def test_a_seed_gives_one_trace_and_rate_and_skew_keep_its_luck():
    assert workload().trace(5.0, 50) == workload().trace(5.0, 50)
    assert workload(seed=1).trace(5.0, 50) != workload().trace(5.0, 50)
    slow, fast = workload(output="uniform:1-9").trace(1.0, 50), workload(2.0, output="uniform:1-9").trace(10.0, 50)
    assert [request.arrival for request in slow] == pytest.approx([10 * request.arrival for request in fast])
    assert [request.output_tokens for request in slow] == [request.output_tokens for request in fast]


@pytest.mark.parametrize(
    ("models", "skew", "problem"), [((), 1, "no models"), (("a", "a"), 1, "duplicate"), (("a",), -1, "skew -1")]
)
def test_shares_of_nothing(models, skew, problem):
    with pytest.raises(QsunError, match=problem):
        zipf_shares(models, skew)


def test_a_trace_is_read_from_what_a_load_left(tmp_path):
    row = {"arrival": 3.0, "model": "a", "prompt_tokens": 7, "output_tokens": 2, "warm_up": False, "error": ""}
    rows = [row | {"arrival": 5.5}, row, row | {"warm_up": True, "arrival": 0}, row | {"error": "deadline"}]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert read_trace(path) == [TracedRequest(0.0, "a", 7, 2), TracedRequest(2.5, "a", 7, 2)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt_tokens": None}, "numbers"),
        ({"prompt_tokens": math.inf}, "numbers"),
        ({"output_tokens": 0}, "out of range"),
        ({"arrival": -1}, "out of range"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path, change, problem):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"arrival": 0, "model": "a", "prompt_tokens": 1, "output_tokens": 1} | change) + "\n")
    with pytest.raises(QsunError, match=f"line 1.*{problem}"):
        read_trace(path)
    path.write_text('{"arrival": 1}\n')
    with pytest.raises(QsunError, match="line 1: no 'model'"):
        read_trace(path)
    path.write_text("")
    with pytest.raises(QsunError, match="no requests"):
        read_trace(path)
