"""The kernel bench: sizes that are those of the named models, a checked product, honest arithmetic."""

import json

import pytest
import torch

from qsun.errors import QsunError
from qsun.eval.speed import kernel_bench
from qsun.eval.speed.kernel_bench import (
    KernelTiming,
    KernelVariant,
    Patience,
    bench_kernels,
    layers_of,
    mean_ratios,
    report_text,
)
from qsun.eval.speed.model_shapes import MODEL_SHAPES

PARAMETERS = {  # as the models' own pages give them
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b-tp4": 70.6e9,
    "llama-3.2-1b": 1.24e9,
    "qwen3-8b": 8.19e9,
    "qwen3-1.7b": 1.72e9,
}


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_shapes_add_up_to_the_model(name):
    shape = MODEL_SHAPES[name]
    blocks = shape.ranks * shape.layers * sum(N * K for N, K in shape.linear_layers().values())
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    assert blocks + embeddings == pytest.approx(PARAMETERS[name], rel=0.005)


def run(minutes=1.0, note=lambda _: None, bits=4, group_size=32):
    kind = KernelVariant(group_size, bits=bits)
    return bench_kernels(layers_of([], ["96x64"]), [1, 20], kind, Patience(3, 1.0, minutes), note)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setitem(kernel_bench._BEYOND_CACHES_BYTES, "cpu", 1 << 14)


def test_every_contender_at_every_point():
    rows = run()["rows"]
    assert [(row["kernel"], row["M"]) for row in rows] == [("bf16", 1), ("ours", 1), ("bf16", 20), ("ours", 20)]
    for full, ours in zip(rows[::2], rows[1::2], strict=True):
        assert full["ratio_to_bf16"] == 1
        assert ours["ratio_to_bf16"] == pytest.approx(full["microseconds"] / ours["microseconds"])


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits(bits):
    assert {row["kernel"] for row in run(bits=bits)["rows"]} == {"bf16", "ours"}


def test_bits_without_a_kernel():
    with pytest.raises(QsunError, match="bits 5 has no kernel; use 2, 3, 4 or 8"):
        run(bits=5)


def test_a_wrong_product_is_not_timed(monkeypatch):
    def wrong(weights, group_size, dtype, bits):
        return lambda: lambda x: x @ weights.dequantize().to(dtype).t() * 1.1

    monkeypatch.setitem(kernel_bench.CPU_CONTENDERS, "ours", wrong)
    with pytest.raises(QsunError, match="ours at 96 x 64 is wrong by 0"):
        run()


def test_a_wrong_peer_is_left_out(monkeypatch):
    notes = []
    for name, factor in (("peer", 1.1), ("broken", float("nan"))):

        def build(weights, size, dtype, bits, f=factor):
            return lambda: lambda x: x @ weights.dequantize().to(dtype).t() * f

        monkeypatch.setitem(kernel_bench.CPU_CONTENDERS, name, build)
    rows = run(note=notes.append)["rows"]
    assert {row["kernel"] for row in rows} == {"bf16", "ours"}
    assert [note for note in notes if "left out" in note and "peer at 96 x 64 is wrong by 0." in note]
    assert [note for note in notes if "broken at 96 x 64 is wrong by nan" in note]


def test_a_peer_that_fails_is_left_out_with_its_reason(monkeypatch):
    def broken(weights, group_size, dtype, bits):
        raise RuntimeError("no such device")

    notes = []
    monkeypatch.setitem(kernel_bench.CPU_CONTENDERS, "peer", broken)
    monkeypatch.setattr(kernel_bench, "OURS", ("bf16", "ours"))
    rows = run(note=notes.append)["rows"]
    assert "peer left out: RuntimeError: no such device" in notes
    assert {row["kernel"] for row in rows} == {"bf16", "ours"}


def test_out_of_time():
    notes = []
    assert run(minutes=0, note=notes.append)["rows"] == []
    assert notes == [" 96x64 96x64 left out: 0 minutes are over"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line(cli):
    answer = cli("bench", "kernels", "--device", "cuda")
    assert answer.code == 2
    assert "no CUDA device" in answer.err


def test_geometric_mean():
    rows = [KernelTiming("", "", 1, 1, M, "ours", 1.0, ratio, 0.0) for M, ratio in ((1, 2.0), (1, 8.0), (4, 1.5))]
    assert mean_ratios(rows)["ours"] == pytest.approx({1: 4.0, 4: 1.5})


@pytest.mark.parametrize("shape", ["4096", "64x", "0x64", "96x65", "axb"])
def test_shapes_that_are_none(shape):
    with pytest.raises(QsunError, match="multiples of 32"):
        layers_of([], [shape])


def test_a_group_that_does_not_divide():
    with pytest.raises(QsunError, match="group_size 128 does not divide K = 64"):
        run(group_size=128)


def test_a_model_that_is_not_known():
    with pytest.raises(QsunError, match="gpt-5 has no known shape"):
        layers_of(["gpt-5"], [])


def test_only_a_gpu_has_a_share_of_the_copy_bandwidth():
    result = run() | {"machine": "a machine", "torch": "2"}
    assert "% copy" not in report_text(result)
    assert "% copy" in report_text(result | {"device": "cuda"})


def test_command(cli, tmp_path):
    answer = cli(
        "bench", "kernels", "--device", "cpu", "--shape", "64x128", "-m", "1,2", "--rounds", 3, "--json", "-o", tmp_path
    )
    result = json.loads(answer.out)
    assert [row["M"] for row in result["rows"]] == [1, 1, 2, 2]
    assert json.loads((tmp_path / "kernels.json").read_text()) == result
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
