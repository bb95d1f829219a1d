"""KL and perplexity against float64, on a model whose logits are known."""

import types
from dataclasses import asdict

import pytest
import torch

from qsun.data.examples import TokenExample
from qsun.errors import QsunError
from qsun.eval.harness.divergence import (
    mean_divergence,
    read_windows,
    response_divergence,
    text_divergence,
)
from qsun.eval.study.passes import compare_passes
from qsun.runtime import logits
from qsun.runtime.decode_module import load_decode
from tests.seam_oracle import seam_reference
from tests.tiny_models import VOCAB, random_tokens


def model_of(table):
    """A bigram model: logits of a token are a row of the table."""
    return types.SimpleNamespace(
        model=lambda input_ids: types.SimpleNamespace(last_hidden_state=table[input_ids]),
        lm_head=lambda hidden: hidden,
        config=types.SimpleNamespace(vocab_size=len(table)),
    )


@pytest.fixture(params=[64 << 20, 1000], ids=["one piece", "many pieces"], autouse=True)
def piece_bytes(request, monkeypatch):
    monkeypatch.setattr(logits, "PIECE_BYTES", request.param)


def test_mean_divergence():
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(11, 11, generator=g), torch.randn(11, 11, generator=g)
    windows = torch.randint(0, 11, (37, 9), generator=g)  # not a multiple of the batch
    p, q = (t.double().log_softmax(-1)[windows] for t in (first, second))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert mean_divergence(model_of(second), model_of(first), windows) == pytest.approx(exact, rel=1e-5)
    assert mean_divergence(model_of(first), model_of(first), windows) == pytest.approx(0, abs=1e-7)


def exact(ours, theirs, following):
    """The six numbers from float64 logits of all positions."""
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    pick = torch.arange(len(following)), torch.tensor(following)
    return {
        "positions": len(following),
        "mean_kl": float(kl.mean()),
        "p99_kl": sorted(kl.tolist())[-(len(following) // 100) - 1],
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "loss": -float(q[pick].mean()),
        "reference_loss": -float(p[pick].mean()),
    }


def test_text_against_float64():
    g = torch.Generator().manual_seed(2)
    first, second = torch.randn(11, 11, generator=g), torch.randn(11, 11, generator=g)
    windows = torch.randint(0, 11, (37, 9), generator=g)
    found = asdict(text_divergence(model_of(second), model_of(first), windows))
    read, following = windows[:, :-1].flatten(), windows[:, 1:].flatten().tolist()
    assert found == pytest.approx(exact(second.double()[read], first.double()[read], following), rel=1e-5)


def test_decode_positions_against_a_forward_pass_with_two_sets_of_weights(tiny_model):
    directory = tiny_model("llama")
    prefill, decode, reference = (load_decode(directory, "cpu", torch.float64).model for _ in range(3))
    torch.manual_seed(1)
    with torch.no_grad():
        for model, size in ((prefill, 0.05), (decode, 0.02)):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * size)
    rows = random_tokens(5, 14, seed=3).tolist()
    examples = [
        TokenExample(tuple(r[:n]), tuple(r[n : n + m]))
        for r, n, m in zip(rows, (1, 2, 5, 9, 3), (4, 1, 5, 3, 11), strict=True)
    ]
    states = {name: dict(m.named_parameters()) for name, m in (("p", prefill), ("d", decode), ("r", reference))}
    expected = {
        name: torch.cat(
            [
                seam_reference(states["p"], states[name], prefill.config, [*e.prompt, *e.response[:-1]], len(e.prompt))
                for e in examples
            ]
        )
        for name in ("d", "r")
    }
    following = [token for e in examples for token in e.response]
    wanted = exact(expected["d"].detach(), expected["r"].detach(), following)
    assert expected["d"].shape == (24, VOCAB)
    found = asdict(response_divergence(prefill, decode, reference, examples, batch_size=2))
    assert found == pytest.approx(wanted, rel=2e-5)


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
