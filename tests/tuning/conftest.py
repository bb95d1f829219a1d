"""Tuning without pictures, which take a large part of a tiny run's time, and with a state at every validation."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def tiny_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsun.tuning.tuner.plot_losses", lambda *_: None)
        patch.setattr("qsun.tuning.run_state._SAVE_SECONDS", 0.0)
        yield
