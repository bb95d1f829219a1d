"""Every test of the passes runs on the compiled loops and on those in torch."""

import pytest

from qsun.quantization.methods import loops


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def chosen_loops(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(loops, "_compiled", lambda: None)
    elif loops._compiled() is None:
        pytest.skip("numba is not installed")
    return request.param
