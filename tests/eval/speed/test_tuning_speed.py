"""`qsun bench tuning`: both sides take steps, and the reported times are theirs."""

import json
from types import SimpleNamespace

from qsun.demo.tasks import examples, write_jsonl
from qsun.eval.speed import clock as timing
from qsun.eval.speed import tuning_speed
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
    assert found["ratio"] > 0


def test_the_ratio_is_the_median_of_the_pairs(tmp_path, monkeypatch):
    """By a clock of its own: SUN's steps take 2, 3, 10 and the fine-tune's 4, 4, 4, after two that warm up."""
    write_jsonl(tmp_path / "code.jsonl", examples("code", "train", 40))
    taken = iter([9, 9, 9, 9, 2, 4, 3, 4, 10, 4])
    clock = SimpleNamespace(now=0.0)

    def step(_):
        clock.now += next(taken)

    monkeypatch.setattr(Tuner, "train_step", step)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = tuning_speed.compare_tuning("demo", tmp_path / "code.jsonl", steps=3, batch_size=4, device="cpu")
    assert found == {"sun": 3, "full": 4, "ratio": 0.75, "steps": 3}


def test_data_of_both_sides_cannot_be_a_pipe(cli, pipe):
    answer = cli("bench", "tuning", "demo", "--data", pipe())
    assert answer.code == 2
    assert "is a pipe, which can be read only once" in answer.err
