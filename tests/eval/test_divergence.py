"""KL and perplexity against float64, on a model whose logits are known."""

import types

import pytest
import torch

from qsun.errors import QsunError
from qsun.eval.divergence import log_probabilities, mean_divergence, perplexity
from qsun.eval.passes import compare_passes, read_windows


def model_of(table):
    """A bigram model: logits of a token are a row of the table."""
    return lambda input_ids: types.SimpleNamespace(logits=table[input_ids])


def test_divergence_and_perplexity():
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(11, 11, generator=g), torch.randn(11, 11, generator=g)
    windows = torch.randint(0, 11, (37, 9), generator=g)  # not a multiple of the batch
    reference = log_probabilities(model_of(first), windows)
    p, q = (t.double().log_softmax(-1)[windows] for t in (first, second))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert mean_divergence(model_of(second), reference, windows) == pytest.approx(exact, rel=1e-5)
    assert mean_divergence(model_of(first), reference, windows) == pytest.approx(0, abs=1e-7)
    nll = -p[:, :-1].gather(-1, windows[:, 1:, None]).mean()
    assert perplexity(reference, windows) == pytest.approx(float(nll.exp()), rel=1e-5)


def test_windows_must_suffice(tmp_path):
    import numpy as np

    np.save(tmp_path / "ids.npy", np.arange(50))
    assert read_windows(tmp_path / "ids.npy", "demo", 5, 10)[4, 0] == 40
    with pytest.raises(QsunError, match="50 tokens; 6 windows of 10 need 60"):
        read_windows(tmp_path / "ids.npy", "demo", 6, 10)


@pytest.mark.slow
def test_passes_on_the_embedded_base(tmp_path):
    from qsun.demo import calibration_file

    rows = compare_passes(
        "demo",
        str(calibration_file()),
        calibration_file(),
        grids=["3s"],
        methods=["rtn", "gptq", "refined"],
        settings={"group_size": 64, "samples": 32, "seq_len": 256},
        windows=(16, 256),
        threads=1,
    )
    rtn, gptq, refined = (row["kl_x1000"] for row in rows)
    assert refined < gptq < rtn
