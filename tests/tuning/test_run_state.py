"""States of a run of tuning: seldom written, and whole whenever the run is killed."""

import pytest
import torch

from qsun.model.output_dir import Workdir
from qsun.tuning.processes import Processes
from qsun.tuning.run_state import RunState


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
