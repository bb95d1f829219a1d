"""`qsun bench engine`: one trace through both systems, every token accounted for, and a prediction of each."""

import json

import pytest

from qsun.eval.simulate import engine_comparison
from qsun.eval.simulate.engine_comparison import EngineComparison, Probe, curves_of
from qsun.runtime.decode_module import load_decode
from qsun.runtime.prefill_module import load_prefill


def test_both_systems_run_the_trace_and_are_predicted(cli, tmp_path):
    answer = cli(
        "bench", "engine", "--requests", 9, "--rounds", 2, "--rate", 1000, "--prompt", "uniform:2-12", "--output",
        "fixed:5", "--max-batch", 4, "--json", "-o", tmp_path,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert json.loads((tmp_path / "engine.json").read_text()) == result
    assert result["requests"] == 9
    for name in ("shared", "partitioned"):
        one = result["systems"][name]
        assert len(one["rounds"]) == 2
        for key, value in one["measured"].items():
            assert value > 0
            assert one["predicted_over_measured"][key] == pytest.approx(one["predicted"][key] / value)
    for key, ratios in result["shared_over_partitioned"].items():
        ours, theirs = (result["systems"][name]["rounds"] for name in ("shared", "partitioned"))
        assert ratios == [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]


def test_a_table_on_the_screen_and_one_line_for_a_mistake(cli):
    answer = cli("bench", "engine", "--requests", 2, "--rounds", 1, "--output", "fixed:2", "--max-batch", 1)
    assert answer.code == 0, answer.err
    assert "\nshared " in answer.out
    assert "shared over partitioned, mean TPOT, ms, by round" in answer.out
    wrong = cli("bench", "engine", "--output", "some")
    assert wrong.code == 2
    assert "'some'" in wrong.err


def test_answers_of_one_token_are_refused_before_a_module_is_loaded(cli):
    answer = cli("bench", "engine", "--output", "fixed:1", "--decode", "nowhere")
    assert answer.code == 2
    assert "all requests have 1 output token, so there is no TPOT" in answer.err


def test_means_over_rounds_are_found_again_at_the_measured_points():
    steps = {16: {1: 0.001, 2: 0.002}, 64: {1: 0.003, 2: 0.005}}
    prompts = {1: {1: 0.01, 2: 0.012}, 8: {1: 0.02, 2: 0.03}, 32: {1: 0.05}}
    slower = [{a: {b: 3 * seconds for b, seconds in row.items()} for a, row in t.items()} for t in (steps, prompts)]
    curves = curves_of([Probe(steps, prompts), Probe(*slower)])
    assert curves.step("sun", 2, 64) == pytest.approx(2 * 0.005)
    assert curves.prefill(32) == pytest.approx(2 * 0.05)
    assert curves.side_by_side(2, 8) == pytest.approx(2 * 0.03)
    assert curves.beyond("sun", 3, 64)


def test_a_probe_times_what_the_engine_does(talking_model, monkeypatch):
    """With a clock that counts rows, every point within the limits of positions, rows and turn is timed at its rows."""

    def rows_as_seconds(call):
        call()
        engine = getattr(call, "__self__", None)
        return 1e-3 * sum(state.decoding for state in engine.state.models.values()) if engine else 1.0

    monkeypatch.setattr(engine_comparison, "_seconds", rows_as_seconds)
    monkeypatch.setattr(engine_comparison, "_TIMED", 4)
    decode = load_decode(str(talking_model))
    prefills = {"a": load_prefill(str(talking_model), decode)}
    probe = EngineComparison(decode, prefills, max_batch=8, prefill_tokens=64).probe()
    assert list(probe.steps) == [16, 64]
    for by_rows in probe.steps.values():
        assert by_rows == pytest.approx({rows: 1e-3 * rows for rows in (1, 2, 4, 8)})
    assert list(probe.prompts[8]) == [1, 2, 4, 8]
    assert list(probe.prompts[32]) == [1, 2]
    assert min(seconds for row in probe.prompts.values() for seconds in row.values()) > 0
