"""`qsun bench tuning`: both sides really step, and their times are those reported."""

import json

import pytest

from qsun.demo.tasks import examples, write_jsonl
from qsun.tuning.tuner import Tuner


def test_both_take_turns(cli, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "code.jsonl", examples("code", "train", 40))
    seen = []
    step = Tuner.train_step

    def counted(tuner):
        before = {name: p.detach().clone() for name, p in tuner.optimizer.parameters.items()}
        step(tuner)
        seen.append(tuner.config.fine_tune)
        assert any((p != before[name]).any() for name, p in tuner.optimizer.parameters.items())

    monkeypatch.setattr(Tuner, "train_step", counted)
    answer = cli(
        "bench", "tuning", "demo", "--data", tmp_path / "code.jsonl", "--steps", 3, "--batch-size", 4, "--json"
    )
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert seen == [False, True] * 5 and found["steps"] == 3
    assert found["sun"] > 0 and found["full"] > 0
    assert found["ratio"] == pytest.approx(found["sun"] / found["full"], rel=1)
