"""Passes on really pretrained models and real text. Skipped where the project's shared folder is absent."""

import pytest

from qsun.eval.study.passes import compare_passes
from tests.places import SHARED

MODELS = SHARED / "models"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODELS.is_dir(), reason="needs ../shared/models: small pretrained models, not in the package"
    ),
]


def divergence(method, grid):
    base = MODELS / "stdlib4m"
    (row,) = compare_passes(
        str(base),
        str(base / "calib.npy"),
        base / "valid.npy",
        grids=[grid],
        methods=[method],
        settings={"group_size": 64},
        windows=(96, 256),
        threads=1,
    )
    return row["kl_x1000"]


@pytest.mark.parametrize(
    ("method", "grid", "at_most"),
    [
        ("gptq", "4s", 0.87),  # the best peer's: auto-gptq with desc_act
        ("gptq", "2a", 23.0),
        ("refined", "4s", 0.64),  # AutoRound's, 200 steps
        ("refined", "2a", 13.0),
    ],
)
def test_no_worse_than_the_best_peer(method, grid, at_most):
    assert divergence(method, grid) < at_most
