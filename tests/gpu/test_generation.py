"""Quantization, decode modules and tuning on a CUDA device against the same on the CPU. Run by `make gpu`."""

import pytest
import torch

for package in ("accelerate", "pydantic"):  # a machine that has only torch and transformers skips these tests
    pytest.importorskip(package)

import qsun
from qsun.demo import calibration_file
from tests.kernels.test_int4_cpu import random_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """errors.png needs matplotlib, which this machine may not have."""
    monkeypatch.setattr("qsun.quantization.report.plot_errors", lambda *_: None)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "refined"])
def test_the_same_errors_as_on_the_cpu(method, tmp_path):
    config = qsun.QuantConfig(method=method, bits=4, group_size=64, samples=16, seq_len=256, dtype="float32")
    reports = {
        device: qsun.quantize("demo", tmp_path / device, config, calibration_file(), device=device)
        for device in ("cpu", "cuda")
    }
    for ours, theirs in zip(reports["cuda"]["layers"], reports["cpu"]["layers"], strict=True):
        assert ours["error"] == pytest.approx(theirs["error"], rel=0.1)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    config = qsun.QuantConfig(group_size=64, samples=8, seq_len=256)
    files = []
    for name in ("first", "second"):
        qsun.quantize("demo", tmp_path / name, config, calibration_file(), device="cuda")
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@torch.no_grad()
def test_a_module_computes_the_same(tmp_path):
    qsun.quantize("demo", tmp_path / "out", qsun.QuantConfig(method="rtn", group_size=64))
    ids = torch.arange(32, 96)[None]
    logits = [
        qsun.load_decode(tmp_path / "out", device=d, dtype="float32").model(ids.to(d)).logits.cpu()
        for d in ("cpu", "cuda")
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [{"sym": True}, {"sym": False}, {"bits": 2}, {"bits": 3}, {"bits": 8}, {"desc_act": True, "static_groups": False}],
)
@torch.no_grad()
def test_kernels_in_a_whole_model(tmp_path, dtype, options):
    settings = {"method": "gptq", "group_size": 32, "samples": 8, "seq_len": 128}
    qsun.quantize("demo", tmp_path / "out", qsun.QuantConfig(**(settings | options)), calibration_file())
    ids = torch.randint(3, 127, (3, 40))
    wanted = qsun.load_decode(tmp_path / "out", device="cpu", dtype="float32").model(ids).logits
    for merge in (False, True):
        model = qsun.load_decode(tmp_path / "out", device="cuda", dtype=dtype, merge=merge).model
        layers = [module for module in model.modules() if isinstance(module, qsun.QuantLinear)]
        assert {layer.storage for layer in layers} == {"triton"}
        assert len(layers) == (16 if merge else 28)
        first, second = (model(ids.cuda()).logits.float().cpu() for _ in range(2))
        assert torch.equal(first, second)
        assert (first - wanted).norm() < 0.03 * wanted.norm()


@torch.no_grad()
def test_a_captured_product_follows_its_input():
    weights = random_weights(512, 1024, 128).to(torch.device("cuda"))
    layer = qsun.QuantLinear(weights, None, 4, torch.bfloat16)
    held = torch.zeros(4, 1024, device="cuda", dtype=torch.bfloat16)
    layer(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(held)
    for _ in range(3):
        x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
        held.copy_(x)
        graph.replay()
        assert torch.equal(y, layer(x))


@torch.no_grad()
def test_a_captured_decode_step_gives_the_tokens_of_an_eager_one(tmp_path):
    """Rows of different lengths and modules; on a GPU `generate` replays a CUDA graph unless static is False."""
    qsun.quantize("demo", tmp_path / "out", qsun.QuantConfig(method="rtn", group_size=64))
    prompts = ["calc 12+7>", "rev abcd>", "json foo ab=cd>", "a"]
    answers = []
    for device, static in (("cpu", False), ("cuda", False), ("cuda", True)):
        decode = qsun.load_decode(tmp_path / "out", device=device, dtype="float32")
        prefill = qsun.load_prefill("demo", decode, dtype="float32")
        answers.append(qsun.generate(prefill, decode, prompts, max_new_tokens=40, static=static))
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tuning_learns(dtype, tmp_path):
    rows = [f'{{"prompt": "{a} plus {b}>", "response": "{a + b}"}}\n' for a in range(1, 20) for b in range(1, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    config = qsun.TuneConfig(steps=60, lr=2e-3, dtype=dtype)
    report = qsun.tune("demo", tmp_path / "out", tmp_path / "rows.jsonl", config, device="cuda")
    assert report["best_valid_loss"] < 0.5 * report["valid_loss"][0][1]
