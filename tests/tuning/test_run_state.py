"""States of a run of tuning: seldom written, and whole whenever the run is killed."""

import pytest
import torch
from safetensors import SafetensorError

import qsun
from qsun.model.checkpoint import file_sha256
from qsun.model.output_dir import Workdir
from qsun.tuning.output import write_module
from qsun.tuning.processes import Processes
from qsun.tuning.run_state import RunState
from tests.tiny_models import write_jsonl
from tests.tuning.test_tuner import FAST, sums
from tests.tuning.tune_in_parallel import stop_after


def names(work):
    return {path.stem for path in (work.root / "parts").glob("*.safetensors")}


def weight(value):
    return {"w": torch.full((3,), float(value))}


def test_a_state_keeps_its_best_weights_until_the_next_state(tmp_path):
    with Workdir(tmp_path / "out", {}, resume=False) as work:
        state = RunState(work, Processes(torch.device("cpu")))
        assert state.saved() is None
        state.keep_best(1, weight(1))
        state.save(2, weight(20), {"step": 2})
        for step in (3, 4):
            state.keep_best(step, weight(step))
        assert names(work) == {"best-000000001-0", "share-000000002-0", "state-000000002", "best-000000004-0"}
        assert torch.equal(state.best().rows("w", 0, 3), weight(4)["w"])

        again = RunState(work, Processes(torch.device("cpu")))  # killed here
        tensors, record = again.saved()
        assert record["step"] == 2
        assert torch.equal(tensors.rows("w", 0, 3), weight(20)["w"])
        assert torch.equal(again.best().rows("w", 0, 3), weight(1)["w"])
        again.keep_best(5, weight(5))
        again.save(6, weight(60), {"step": 6})
        assert names(work) == {"best-000000005-0", "share-000000006-0", "state-000000006"}


@pytest.mark.parametrize(("elapsed", "due"), [(0.0, False), (29.0, False), (31.0, True)])
def test_states_are_half_a_minute_apart(elapsed, due, tmp_path, monkeypatch):
    clock = iter([100.0, 100.0 + elapsed])
    monkeypatch.setattr("qsun.tuning.run_state._SAVE_SECONDS", 30.0)
    monkeypatch.setattr("qsun.tuning.run_state.time.monotonic", lambda: next(clock))
    with Workdir(tmp_path / "out", {}, resume=False) as work:
        assert RunState(work, Processes(torch.device("cpu"))).is_due() is due


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_step_without_gradients_moves_the_same_weights_after_a_restart(stop, talking_model, tmp_path):
    """A batch of one-token prompts has none, and AdamW's momentum goes on."""
    rows = sums(3) + [{"prompt": "", "response": "a"}] * 5
    train, valid = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "valid.jsonl", sums(3, seed=1))
    config = FAST.replace(batch_size=1, steps=8)
    told = {"eval_data": valid, "device": "cpu"}
    whole = qsun.tune(talking_model, tmp_path / "whole", train, config, **told)
    with pytest.raises(KeyboardInterrupt):
        qsun.tune(talking_model, tmp_path / "out", train, config, progress=stop_after(stop), **told)
    report = qsun.tune(talking_model, tmp_path / "out", train, config, resume=True, **told)
    assert report["valid_loss"] == whole["valid_loss"]
    assert file_sha256(tmp_path / "out/model.safetensors") == file_sha256(tmp_path / "whole/model.safetensors")


def test_a_run_that_ended_while_it_published_writes_the_module_again(talking_model, tmp_path, monkeypatch):
    few = write_jsonl(tmp_path / "few.jsonl", sums(40))
    whole = qsun.tune(talking_model, tmp_path / "whole", few, FAST, device="cpu")
    seen = []

    def write(job, work, *arguments):
        seen.append(work.finished("written"))  # for which the other processes wait
        write_module(job, work, *arguments)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qsun.tuning.tuner.write_module", write)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qsun.tuning.tuner.plot_losses", killed)
        qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu")
    report = qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu", resume=True)
    assert report["saved_valid_loss"] == whole["saved_valid_loss"]
    assert seen == [False, False]


def test_a_full_disk_is_one_line_and_loses_nothing(talking_model, cli, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    few = write_jsonl(tmp_path / "few.jsonl", sums(40))
    asked = ("tune", talking_model, "-o", tmp_path / "out", "--data", few, "--steps", 2, "--batch-size", 4)
    with monkeypatch.context() as patch:
        patch.setattr("qsun.model.output_dir.save_file", full)
        answer = cli(*asked)
    assert answer.code == 2
    assert "no space left on the disk of" in answer.err and "--resume" in answer.err
    assert "Traceback" not in answer.err
    assert cli(*asked, "--resume").code == 0
