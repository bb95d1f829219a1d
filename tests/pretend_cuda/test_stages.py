"""The stages of `make gpu` on a pretended CUDA device: they run, and write each result when they have it."""

import pytest
import torch

from qsun.eval.speed import decode_speed, kernel_bench, kernel_tuning, model_shapes
from qsun.eval.speed.model_shapes import ModelShape
from tests.gpu import floors, stages

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(model_shapes.MODEL_SHAPES, "tiny", ModelShape(256, 2, 4, 2, 64, 512, 1024))
    monkeypatch.setattr(stages, "shape_of", lambda *_: "tiny")
    monkeypatch.setattr(stages, "KERNEL_MODELS", ["tiny"])
    monkeypatch.setattr(stages, "ROWS", [1, 64, 8, 2])
    monkeypatch.setattr(stages, "STEP_POINTS", [(1, 40), (4, 40)])
    monkeypatch.setitem(kernel_bench._BEYOND_CACHES_BYTES, "cuda", 1 << 10)
    monkeypatch.setattr(kernel_tuning, "_COPIES_BYTES", 1 << 10)
    monkeypatch.setitem(stages.KV_BYTES, "cuda", 1 << 22)
    for module in (kernel_bench, decode_speed):
        monkeypatch.setattr(module, "copy_bandwidth", lambda *_: 1e12)


def test_kernels(pretend_cuda, tmp_path):
    stages.kernels(tmp_path, CUDA, stages.Clock(300))
    rows = floors.read(tmp_path, "kernels")
    ours = [(row["M"], row["bits"]) for row in rows if row["kernel"] == "ours" and row["layer"] == "o"]
    assert ours == [(M, bits) for rows in (stages.ROWS[:3], stages.ROWS[3:]) for bits in (4, 2) for M in rows]
    assert {row["bits"] for row in rows if row["kernel"] == "bf16"} == {4}
    assert {row["layer"] for row in rows} == {"qkv", "o", "gate_up", "down"}


def test_steps_and_a_clock_that_runs_out(pretend_cuda, tmp_path, capsys):
    stages.step(tmp_path, CUDA, stages.Clock(300))
    rows = floors.read(tmp_path, "step")
    assert [(row["batch"], row["variant"]) for row in rows] == [
        (batch, name) for batch in (1, 4) for name in ("sun", "qsun", "qsun+head", "qsun-2bit")
    ]
    weights = {row["variant"]: row["weight_bytes"] for row in rows}
    assert weights["qsun-2bit"] < weights["qsun"] < weights["sun"]
    stages.step(tmp_path / "none", CUDA, stages.Clock(0))
    assert "batch 1, context 40 and all after it: no time" in capsys.readouterr().out
    assert floors.read(tmp_path / "none", "step") == []


def test_serving(pretend_cuda, tmp_path, monkeypatch):
    from qsun.engine import warming

    monkeypatch.setattr(stages, "Path", lambda *a: tmp_path)
    warmed = []
    monkeypatch.setattr(warming, "warm", lambda engine: warmed.append(engine) or 0)
    monkeypatch.setitem(stages.LOADS, "cuda", [(3, 8, 4), (9, 4, 2)])
    stages.serve(tmp_path, CUDA, stages.Clock(300))
    assert len(warmed) == 1
    first, *loads = floors.read(tmp_path, "serve")
    assert first["graphs"] == 0
    assert [result["requests"] for result in loads] == [3, 9]
    assert all(result["done"] and result["tokens_per_s"] > 0 for result in loads)


def test_tuning_stops_in_time_with_a_whole_table(pretend_cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_tuning, "candidates", lambda *_: [])
    monkeypatch.setattr("qsun.eval.speed.kernel_bench.layers_of", lambda *_: [("", "", 256, 256)])
    with pytest.raises(SystemExit):
        stages.tune(tmp_path, CUDA, stages.Clock(0))
    from qsun.kernels.launch_table import parse_launch_table

    (table,) = tmp_path.glob("*.json")
    import json

    assert len(parse_launch_table(json.loads(table.read_text())).shapes["256x256w4g128"]) == 1
