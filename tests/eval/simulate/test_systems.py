"""Conventional, SUN and QSUN: who holds what, searches over rates and workers, and the whole command."""

import json
from dataclasses import replace

import pytest

from qsun.errors import QsunError
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.load.workload import Lengths, TracedRequest, Workload
from qsun.eval.simulate import capacity
from qsun.eval.simulate.capacity import Scenario, default_level, find_capacity, mean_tpot_ms, workers_needed
from qsun.eval.simulate.compared_systems import CONVENTIONAL, KINDS, Deployment, assign
from qsun.eval.simulate.curves import QSUN, SUN, Curves, DoesNotFit, Footprint, computed_curves
from qsun.eval.simulate.report import report_figure, report_text
from qsun.eval.simulate.simulation import simulate
from qsun.eval.simulate.sweep import over_skew, where_ratio
from qsun.eval.simulate.system import DecodeWorker, System

SHARES = {"a": 0.6, "b": 0.3, "c": 0.1}
STEP = {SUN: 0.1, QSUN: 0.05}  # whatever the batch: a worker serves max_batch rows for the price of one
FLAT = Curves(
    lambda variant, batch, context: STEP[variant],
    lambda tokens: 1e-6,
    "made up",
    {},
    dict.fromkeys(STEP, Footprint(6e8, 1000)),
)


def scenario(models=4, skew=0.0, requests=400, **deployment):
    names = tuple(f"m{number}" for number in range(models))
    workload = Workload(names, skew, Lengths("fixed", 10), Lengths("fixed", 20))
    return Scenario(workload, FLAT, Deployment(**({"max_batch": 4} | deployment)), ServiceLevel(2000), 0.9, requests)


@pytest.mark.parametrize(
    ("workers", "how", "expected"),
    [
        (3, "load", [("a",), ("b",), ("c",)]),
        (6, "equal", [("a",), ("a",), ("b",), ("b",), ("c",), ("c",)]),
        (5, "equal", [("a",), ("a",), ("b",), ("b",), ("c",)]),
        (6, "load", [("a",), ("a",), ("a",), ("b",), ("b",), ("c",)]),
        (2, "load", [("a",), ("b", "c")]),
        (2, "equal", [("a", "c"), ("b",)]),
        (1, "load", [("a", "b", "c")]),
    ],
)
def test_assignment_of_workers_to_models(workers, how, expected):
    assert assign(SHARES, workers, how) == expected


def test_who_holds_what():
    deployment = Deployment(memory_bytes=1.5e9)
    made = {kind: deployment.system(kind, 2, SHARES, {}.fromkeys(SHARES, 1), FLAT) for kind in (CONVENTIONAL, SUN)}
    own, mixed = made[CONVENTIONAL].decode
    assert (own.models, own.turns, own.variant) == (("a",), False, SUN)
    assert (mixed.models, mixed.turns) == (("b", "c"), True)
    assert (own.kv_tokens, mixed.kv_tokens) == (750_000, 150_000)  # 1.35 GB less 0.6 GB for each module
    for worker in made[SUN].decode:
        assert (worker.models, worker.turns, worker.kv_tokens) == (("a", "b", "c"), False, 750_000)
    assert made[SUN].workers == 5


def test_an_in_process_engine_has_no_prefill_workers():
    worker = Deployment(prefill_tokens=64).system(SUN, 1, SHARES, dict.fromkeys(SHARES, 1), FLAT)
    assert worker.prefill == {}
    assert (worker.decode[0].prefill_tokens, worker.decode[0].fair, worker.decode[0].padded) == (64, True, True)


def test_prefill_workers_follow_each_models_load():
    curves = Curves(FLAT.step, lambda tokens: 0.1, "made up")
    trace = Workload(("a", "b"), 1.0, Lengths("fixed", 9), Lengths("fixed", 1)).trace(30.0, 3000)
    found = Deployment().prefill_for(trace, {"a": 2 / 3, "b": 1 / 3}, curves)
    assert found == {"a": pytest.approx(4, abs=1), "b": pytest.approx(2, abs=1)}  # 20 and 10 a second, half busy
    assert Deployment(prefill_workers=7).prefill_for(trace, {"a": 1, "b": 1}, curves) == {"a": 7, "b": 7}


def test_capacity_is_where_full_batches_are():
    """4 workers of 4 rows give 16 tokens a step of 0.1 s: 8 answers of 20 tokens a second, and with int4 16."""
    assert find_capacity(scenario(), SUN, 4).rate == pytest.approx(8, rel=0.08)
    assert find_capacity(scenario(), QSUN, 4).rate == pytest.approx(16, rel=0.08)
    assert find_capacity(scenario(), SUN, 2).tokens_per_s() == pytest.approx(40, rel=0.12)


def test_skew_costs_the_conventional_system_what_the_busiest_model_takes():
    """Own workers at skew 1 over 4 models: the busiest has 12/25 of the requests and a quarter of the workers."""
    patient = ServiceLevel(20_000)  # a queue of one model alone swings wide
    even, skewed = (
        find_capacity(replace(scenario(skew=skew, requests=2000), level=patient), CONVENTIONAL, 4).rate
        for skew in (0.0, 1.0)
    )
    assert even == pytest.approx(8, rel=0.15)
    assert skewed == pytest.approx(8 * 25 / 48, rel=0.15)
    assert find_capacity(scenario(skew=1.0), SUN, 4).rate == pytest.approx(8, rel=0.08)


def test_no_rate_is_served_where_a_lone_request_is_too_slow():
    assert find_capacity(scenario(), SUN, 4, tpot_ms=50) is None
    assert find_capacity(scenario(), QSUN, 4, tpot_ms=51) is not None


def test_workers_needed_are_the_fewest():
    case = scenario(skew=1.0)
    for kind in KINDS:
        count = workers_needed(case, kind, 7.0)
        assert case.serves(case.run(kind, count, 7.0))
        assert not case.serves(case.run(kind, count - 1, 7.0))
    assert workers_needed(case, SUN, 7.0) == 4
    assert workers_needed(case, QSUN, 7.0) == 2
    assert workers_needed(case, CONVENTIONAL, 7.0) >= 5
    assert workers_needed(replace(case, level=ServiceLevel(1.0)), SUN, 1.0) is None


@pytest.mark.parametrize(
    "room",
    [
        {"memory_bytes": 1e9},  # one module of 0.6 GB fits beside some KV, four do not
        {"kv_tokens": 40, "prefill_tokens": 64},  # a request takes 30, four models have 10 each
    ],
)
def test_few_workers_that_do_not_fit_are_too_few(room):
    case = scenario(**room)
    with pytest.raises(DoesNotFit):
        case.run(CONVENTIONAL, 1, 1.0)
    assert workers_needed(case, CONVENTIONAL, 0.5) == 4
    assert find_capacity(case, CONVENTIONAL, 1) is None
    assert find_capacity(case, CONVENTIONAL, 4) is not None


def test_what_fits_nowhere_is_said():
    case = scenario(memory_bytes=0.6e9)
    assert workers_needed(case, CONVENTIONAL, 1.0) is None
    for rate in (None, 1.0):
        with pytest.raises(DoesNotFit, match="cannot hold 1 x sun"):
            over_skew(case, 4, [0.0], rate, lambda *_: None)


@pytest.mark.parametrize("rate", [None, 3.0])
def test_no_system_within_the_slo_is_said(rate):
    case = replace(scenario(requests=100), level=ServiceLevel(2000, 10))
    with pytest.raises(QsunError, match="no system meets the SLO at any rate; relax --slo-ttft or --slo-tpot"):
        over_skew(case, 4, [0.0], rate, lambda *_: None)


@pytest.mark.parametrize("only", [{"level": ServiceLevel(2000, 60)}, {"deployment": Deployment(4, memory_bytes=1e9)}])
def test_the_only_system_that_serves_sets_the_rate(only):
    """SUN's steps of 100 ms are too slow, or its module too large; QSUN has a capacity all the same."""
    footprints = {SUN: Footprint(2e9, 1000), QSUN: Footprint(5e8, 1000)}
    case = replace(scenario(requests=60), curves=replace(FLAT, footprints=footprints), **only)
    rows = over_skew(case, 4, [0.0], None, lambda *_: None)
    assert [row["rate"] > 0 for row in rows] == [False, False, True]
    needed = workers_needed(case, QSUN, rows[0]["needed_rate"])
    assert needed and [row["workers_needed"] for row in rows] == [None, None, needed]
    assert {row["needed_rate"] for row in rows} == {0.9 * rows[2]["rate"]}
    result = {"rows": rows, "setting": "made up", "curves": "made up"}
    lines = report_text(result).splitlines()
    assert lines[3].split()[-3:] == ["-", "-", str(needed)]
    why = ": memory of 1.0 GB cannot hold" if "deployment" in only else ""
    for kind, line in zip((CONVENTIONAL, SUN), lines[4:6], strict=True):
        assert line.startswith(f"{kind} at skew 0 meets the SLO at no rate{why}") and bool(why) == (":" in line)
    assert len(report_figure(result).axes) == 3


def test_a_rate_that_no_number_of_workers_serves_is_a_dash(monkeypatch):
    monkeypatch.setattr(capacity, "_MOST_WORKERS", 4)
    rows = over_skew(scenario(requests=100), 4, [0.0], 50.0, lambda *_: None)
    assert [row["workers_needed"] for row in rows] == [None, None, None]
    result = {"rows": rows, "setting": "made up", "curves": "made up"}
    assert [line.split()[-1] for line in report_text(result).splitlines()[3:6]] == ["-"] * 3
    assert len(report_figure(result).axes) == 3


def test_few_workers_that_do_not_fit_need_more():
    rows = over_skew(scenario(memory_bytes=1e9, requests=100), 1, [0.0], 0.5, lambda *_: None)
    result = {"rows": rows, "setting": "made up", "curves": "made up"}
    said = "conventional at skew 0 meets the SLO at no rate with these workers; it needs 4: "
    (line,) = [line for line in report_text(result).splitlines() if line.startswith(said)]
    assert "cannot hold" in line.removeprefix(said)


def test_fewer_tokens_of_kv_than_models_hold_nothing():
    engine = DecodeWorker(("a", "b", "c"), turns=True, kv_tokens=2, prefill_tokens=8, padded=True)
    with pytest.raises(DoesNotFit, match="a decode worker has 0"):
        simulate([TracedRequest(0.0, "a", 1, 1)], System("s", (engine,)), FLAT)


def test_rows_over_skew_and_where_a_ratio_is_reached():
    rows = over_skew(scenario(requests=300), 4, [0.0, 2.0], None, lambda *_: None)
    assert [(row["skew"], row["system"]) for row in rows] == [(skew, kind) for skew in (0.0, 2.0) for kind in KINDS]
    assert len({row["needed_rate"] for row in rows}) == 1
    assert rows[0]["ratio"] == rows[0]["ratio_same_tpot"] == 1.0
    assert rows[4]["ratio"] > 2 * 0.9  # the busiest of four has 0.70 of the requests: 1 / (4 x 0.25) against 4 x 0.70
    assert rows[5]["ratio"] > 1.5 * rows[4]["ratio"]
    made = [{"skew": s, "system": SUN, "ratio_same_tpot": r} for s, r in ((0, 1.0), (1, 1.5), (2, 2.5))]
    assert where_ratio(made, SUN, 2.0) == pytest.approx(1.5)
    assert where_ratio(made, SUN, 1.0) == 0
    assert where_ratio(made, SUN, 3.0) is None


def test_same_tpot_holds_a_faster_system_to_the_conventional_pace():
    """A step that grows with the batch: at its capacity SUN's TPOT is beyond 105% of the half-empty conventional's."""
    curves = Curves(lambda _, batch, __: 0.05 + 0.02 * batch, lambda tokens: 1e-6, "made up")
    case = scenario(skew=1.5, requests=400)
    case = Scenario(case.workload, curves, case.deployment, ServiceLevel(2000), 0.9, 400)
    reference = find_capacity(case, CONVENTIONAL, 4)
    free, held = (find_capacity(case, SUN, 4, limit) for limit in (1e9, 1.05 * mean_tpot_ms(reference.result)))
    assert mean_tpot_ms(held.result) <= 1.05 * mean_tpot_ms(reference.result) < mean_tpot_ms(free.result)
    assert reference.rate < held.rate < free.rate


def test_no_rate_at_the_same_tpot_is_no_ratio():
    """int4 that is slower from the first row on: within the SLO it serves more, at the conventional pace nothing."""
    step = {SUN: lambda batch: 0.05 + 0.02 * batch, QSUN: lambda batch: 0.15}
    curves = Curves(lambda variant, batch, _: step[variant](batch), lambda tokens: 1e-6, "made up")
    case = replace(scenario(requests=200), curves=curves, level=ServiceLevel(2000, 200))
    rows = over_skew(case, 4, [1.5], 1.0, lambda *_: None)
    slow = rows[-1]
    assert slow["system"] == QSUN
    assert slow["ratio"] > 1
    assert slow["ratio_same_tpot"] is None
    result = {"rows": rows, "setting": "made up", "curves": "made up"}
    lines = report_text(result).splitlines()
    assert lines[5].split()[-2] == "-"
    assert lines[-1] == "qsun: no ratio, because a system meets the SLO, or this one the conventional TPOT, at no rate"
    assert len(report_figure(result).axes) == 3


def test_a_skew_without_a_ratio_is_not_bridged():
    points = ((0, 1.0), (1, None), (2, 3.0), (3, 4.0))
    made = [{"skew": s, "system": SUN, "ratio_same_tpot": r} for s, r in points]
    assert where_ratio(made, SUN, 2.0) == 2
    assert where_ratio(made, SUN, 3.5) == pytest.approx(2.5)


def test_default_level():
    case = scenario()
    level = default_level(case.workload.sample(), FLAT, 4)
    assert level.tpot_ms == pytest.approx(200)
    assert level.ttft_ms == pytest.approx(2000.004)
    assert default_level(case.workload.sample(), FLAT, 4, 7, 8) == ServiceLevel(7, 8)


def small(*more):
    shape = ("--models", "3", "--decode-workers", "3", "--prompt", "fixed:64", "--output", "fixed:16")
    return ("simulate", "--curves", "computed:qwen3-1.7b", *shape, "--requests", "60", *more)


REPLAY = ("simulate", "--curves", "computed:qwen3-1.7b", "--trace")


def test_command_capacity(cli, tmp_path):
    answer = cli(*small("--skew", "0,2", "--max-batch", "4", "-o", tmp_path))
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "simulate.json").read_text())
    assert "not measured" in result["curves"]
    assert "not measured" in answer.out
    assert [row["system"] for row in result["rows"]] == [*KINDS, *KINDS]
    assert "needs: fewest decode workers" in answer.out
    assert (tmp_path / "simulate.png").read_bytes().startswith(b"\x89PNG")


def test_command_rates_are_deterministic(cli, tmp_path):
    answers = [cli(*small("--skew", "1", "--rate", "50,100", "--json", "-o", tmp_path)) for _ in range(2)]
    assert answers[0].out == answers[1].out
    rows = json.loads(answers[0].out)["rows"]
    assert [(row["rate"], row["system"]) for row in rows] == [(rate, kind) for rate in (50, 100) for kind in KINDS]
    assert (tmp_path / "simulate.png").exists()


def test_command_replays_a_trace_in_an_engine(cli, tmp_path):
    trace = tmp_path / "requests.jsonl"
    rows = [{"arrival": i / 9, "model": "ab"[i % 2], "prompt_tokens": 9, "output_tokens": 3} for i in range(10)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = cli(*REPLAY, trace, "--prefill-tokens", "64", "--decode-workers", "1", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["rows"]
    assert [row["requests"] for row in found] == [10, 10, 10]
    assert {row["workers"] for row in found} == {1}


def test_the_default_slo_of_a_trace_is_that_of_its_own_lengths(cli, tmp_path):
    """Prompts of 60,000 tokens take longer than the bounds of the default lengths allow."""
    requests = [TracedRequest(30.0 * i, "a", 60_000, 20) for i in range(5)]
    trace = tmp_path / "requests.jsonl"
    trace.write_text("".join(json.dumps(request._asdict()) + "\n" for request in requests))
    answer = cli(*REPLAY, trace, "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["slo"] == default_level(requests, computed_curves("qwen3-1.7b"), 64).described()
    assert [row["goodput"] for row in result["rows"]] == [1, 1, 1]


def test_a_name_that_only_looks_like_a_number(cli):
    answer = cli(*small("--models", "\u00b2", "--rate", 5, "--skew", 0, "--json"))
    assert json.loads(answer.out)["workload"]["models"] == ["\u00b2"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--trace", "x.jsonl", "--rate", 5, "--skew", 0), "--trace brings its own requests; omit --skew and --rate"),
        (("--trace", "x.jsonl", "--models", 3), "--trace brings its own requests; omit --models"),
        (("--trace", "x.jsonl", "--need", 3), "--trace brings its own requests; omit --need"),
        (("--trace", "x.jsonl", "--prompt", "fixed:1"), "--trace brings its own requests; omit --prompt"),
        (("--rate", 5, "--need", 3), "--need belongs to the search that --rate replaces"),
        (("--need", "inf"), "need inf is out of range"),
        (("--need", -1), "need -1 is out of range"),
    ],
)
def test_options_that_contradict_each_other(cli, options, problem):
    answer = cli("simulate", "--curves", "computed:qwen3-1.7b", *options)
    assert answer.code == 2
    assert problem in answer.err


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--skew", "x", "comma-separated list of numbers"),
        ("--rate", "inf", "not finite"),
        ("--assignment", "best", "assignment 'best'"),
        ("--policy", "best", "policy 'best'"),
        ("--memory-gb", "1", "cannot hold 1 x sun"),
        ("--target", "2", "goodput target 2"),
        ("--models", "0", "no models"),
        ("--decode-workers", "0", "decode workers 0"),
        ("--requests", "1", "too few"),
        ("--transfer-ms", "-5", "transfer_ms -5 is out of range"),
        ("--overhead-ms", "-1", "overhead_ms -1 is out of range"),
        ("--overhead-ms", "nan", "overhead_ms nan is out of range"),
        ("--memory-gb", "nan", "memory of nan GB is out of range"),
    ],
)
def test_command_names_what_is_wrong(cli, option, value, problem):
    answer = cli(*small("--rate", "5", option, value))
    assert answer.code == 2
    assert problem in " ".join(answer.err.split())


def test_computed_curves_know_their_memory():
    curves = computed_curves("llama-3.1-8b")
    assert curves.kv_tokens(QSUN, 141e9) > curves.kv_tokens(SUN, 141e9) > 500_000
