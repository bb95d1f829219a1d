"""`qsun bench engine`: one trace through both systems, every token accounted for, and a prediction of each."""

import json

import pytest


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


def test_a_table_for_people_and_one_line_for_a_mistake(cli):
    answer = cli("bench", "engine", "--requests", 2, "--rounds", 1, "--output", "fixed:2", "--max-batch", 1)
    assert answer.code == 0, answer.err
    assert "| shared |" in answer.out
    assert "shared over partitioned, TPOT, by round" in answer.out
    wrong = cli("bench", "engine", "--output", "some")
    assert wrong.code == 2
    assert "'some'" in wrong.err
