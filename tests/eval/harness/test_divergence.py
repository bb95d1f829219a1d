"""KL and perplexity against float64, on a model whose logits are known."""

import json
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch

from qsun.data.examples import TokenExample
from qsun.demo import calibration_file
from qsun.errors import QsunError
from qsun.eval.harness.divergence import (
    _batches,
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


def test_windows_of_an_array_are_consecutive(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([*range(50), 70000]))  # the last one is in no window
    assert read_windows(tmp_path / "ids.npy", "demo", 5, 10)[4, 0] == 40


@pytest.mark.parametrize(
    ("file", "windows", "says"),
    [
        ("ids.npy", (6, 10), "ids.npy has 50 tokens; 6 windows of 10 need 60"),
        ("ids.npy", (0, 10), "windows 0x10 are out of range; use 1 or more, of 2 or more tokens"),
        ("ids.npy", (1, 1), "windows 1x1 are out of range"),
        ("ids.npy", (1, 513), "windows of 513 tokens go over the 512 positions of demo; use 512 or fewer tokens"),
        ("text.txt", (1, 513), "windows of 513 tokens go over the 512 positions of demo"),
        ("text.txt", (9, 64), "text.txt gives 3 windows of 64 tokens, not 9; give more text, or use 3"),
        ("large.npy", (1, 10), r"large.npy has token 70000, outside the model's vocabulary"),
        ("floats.npy", (1, 10), "text file .*floats.npy holds float64; save token ids"),
        ("torn.npy", (1, 10), "torn.npy is not a valid .npy file"),
        ("missing.npy", (1, 10), "missing.npy does not exist"),
        ("rows.jsonl", (3, 64), r"rows.jsonl has a row of \d+ tokens, and a window is 64; give running text, or sho"),
    ],
)
def test_windows_that_cannot_be_measured_are_one_clear_line(tmp_path, file, windows, says):
    np.save(tmp_path / "ids.npy", np.arange(50))
    np.save(tmp_path / "large.npy", np.full((2, 10), 70000))
    np.save(tmp_path / "floats.npy", np.zeros(50))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "text.txt").write_text("a word and " * 20)
    rows = [{"prompt": f"calc {n}+1>", "response": str(n + 1)} for n in (1, 10, 100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(QsunError, match=says) as error:
        read_windows(tmp_path / file, "demo", *windows)
    assert "\n" not in str(error.value)


def test_a_forward_pass_has_a_bounded_number_of_tokens():
    lengths = [(4000, 20)] * 3 + [(10, 20)] * 500 + [(5, 3000)] * 2 + [(9000, 1)]
    examples = [TokenExample((1,) * prompt, (1,) * response) for prompt, response in lengths]
    batches = list(_batches(examples, 256, torch.device("cpu")))
    assert sum(len(batch.labels) for batch in batches) == len(examples)
    assert max(len(batch.labels) for batch in batches) > 100
    for batch in batches:
        assert len(batch.labels) == 1 or max(batch.prefix.numel(), batch.labels.numel()) <= 4096


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--grids", "4"), "grid '4' is not of the form 4s (4 bits, symmetric) or 4a (asymmetric)"),
        (("--grids", "4x"), "grid '4x' is not of the form 4s"),
        (("--grids", "5s"), "bits"),
        (("--grids", ""), "nothing to compare; give a grid"),
        (("--methods", "magic"), "magic"),
        (("--threads", 0), "--threads"),
        (("--windows", 0), "--windows"),
        (("--window", 1), "--window"),
        (("--window", 513), "windows of 513 tokens go over the 512 positions of demo"),
    ],
)
def test_wrong_options_of_bench_passes_are_errors_before_work_starts(cli, options, says):
    source = calibration_file()
    answer = cli("bench", "passes", "demo", "--calib", source, "--valid", source, *options)
    assert answer.code == 2 and says in answer.err and "Traceback" not in answer.err, answer.err


@pytest.mark.slow
def test_passes_on_the_embedded_base():
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


def test_calibration_of_several_passes_cannot_be_a_pipe(cli, pipe):
    answer = cli("bench", "passes", "demo", "--calib", pipe(), "--valid", "nowhere.npy")
    assert answer.code == 2
    assert "is a pipe, which can be read only once" in answer.err
