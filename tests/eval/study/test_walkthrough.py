"""`qsun demo` with a few steps of tuning: every part runs, and every number is in its place."""

import json
from dataclasses import replace

import pytest

from qsun.demo.tasks import TASKS
from qsun.eval.harness.exact_match import Score
from qsun.eval.study import walkthrough
from qsun.eval.study.walkthrough import QUICK, VARIANTS
from tests.warm_process import warm_context


def test_rate_and_standard_error():
    score = Score((True, False, True, True))
    assert score.rate == 0.75
    assert score.stderr == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


@pytest.mark.slow
def test_the_whole_walkthrough(cli, tmp_path, monkeypatch):
    small = replace(QUICK, steps=8, batch_size=16, train=200, test=12, samples=8, valid=16)
    monkeypatch.setattr(walkthrough, "QUICK", small)
    monkeypatch.setattr("qsun.eval.study.work.get_context", lambda _: warm_context())
    answer = cli("demo", "--quick", "-o", tmp_path / "demo", "--seed", 3, "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert (result["seed"], result["steps"], result["test_examples"]) == (3, 8, 12)
    assert 4 < result["bits_per_weight"] < 4.5
    assert list(result["exact_match"]) == list(TASKS)
    for cells in result["exact_match"].values():
        assert list(cells) == list(VARIANTS)
        assert cells["base"]["rate"] == 0  # it does not know the tasks
    mixed = result["mixed_batch"]
    assert mixed["equal"] == mixed["rows"] == 24
    assert {row["task"] for row in mixed["shown"]} == set(TASKS)
    assert json.loads((tmp_path / "demo/demo.json").read_text()) == result
    assert (tmp_path / "demo/demo.png").read_bytes().startswith(b"\x89PNG")
    again = cli("demo", "--quick", "-o", tmp_path / "demo")
    assert again.code == 2
    assert "exists" in again.err
