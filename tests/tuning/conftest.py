"""Tuning without pictures, which take a large part of a tiny run's time."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_losses_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsun.tuning.tuner.plot_losses", lambda *_: None)
        yield
