"""The benches on a pretended CUDA device: what their timed graphs hold, and which launches tuning survives."""

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from qsun.errors import QsunError
from qsun.eval.speed import clock, kernel_bench, kernel_tuning, model_shapes
from qsun.eval.speed.contenders import SUN, made_contenders
from qsun.eval.speed.decode_speed import filled_batch
from qsun.eval.speed.kernel_bench import KernelVariant, Patience, bench_kernels
from qsun.eval.speed.model_shapes import ModelShape
from qsun.kernels import packed_triton
from qsun.kernels.launch_table import choose_launch

N, K = 256, 256


@pytest.fixture
def kind(monkeypatch):
    monkeypatch.setitem(kernel_bench._BEYOND_CACHES_BYTES, "cuda", 3 * N * K // 2)
    monkeypatch.setattr(kernel_tuning, "_COPIES_BYTES", 3 * N * K // 2)
    monkeypatch.setattr(kernel_bench, "copy_bandwidth", lambda *_: 1e12)
    return KernelVariant(128, True, torch.bfloat16, torch.device("cuda"))


def test_timed_graphs_hold_the_products_alone(pretend_cuda, kind):
    result = bench_kernels([("", "", N, K)], [1, 40], kind, Patience(3, 1.0))
    assert {"bf16", "ours"} <= {row["kernel"] for row in result["rows"]}
    held = [dict(graph.kernels) for graph in pretend_cuda.graphs]
    assert held.count({"triton::packed_matmul": 3}) == 2
    assert sum(set(kernels) <= {"aten::linear", "aten::mm"} for kernels in held) == 2


def test_the_tuning_timer_times_products_behind_norms(pretend_cuda, kind):
    start = choose_launch(1, N, K, 128, "default")
    times = kernel_tuning.gpu_timer(1, N, K, kind)([start])
    assert times[start] > 0
    assert pretend_cuda.graphs[-1].kernels == {"triton::packed_matmul": 3, "triton::rms_norm_rows": 3}


def test_a_graph_is_replayed_several_times_a_turn(pretend_cuda, monkeypatch):
    replays = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda _: replays.append(1))
    x = torch.ones(2, device="cuda")
    clock.interleaved({"add": [lambda: x + 1]}, torch.device("cuda"), rounds=3)
    assert len(replays) >= 1 + 4 * 2


@pytest.mark.parametrize(
    "error",
    [OutOfResources(278528, 232448, "shared memory"), PTXASError("ptxas failed"), CompilationError("", None, "no")],
    ids=lambda error: type(error).__name__,
)
def test_launches_that_do_not_fit_are_left_out(pretend_cuda, kind, monkeypatch, error):
    start = choose_launch(1, N, K, 128, "default")
    large = next(launch for launch in kernel_tuning.candidates(1, N, K, 128) if launch.stages == 6)
    kernel = packed_triton.packed_matmul

    class Limited:
        def __getitem__(self, grid):
            def launch(*args, **options):
                if options["STAGES"] == 6:
                    raise error
                return kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(packed_triton, "packed_matmul", Limited())
    assert list(kernel_tuning.gpu_timer(1, N, K, kind)([start, large])) == [start]


def test_a_gpu_without_the_kernels_is_not_tuned(pretend_cuda, kind, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(QsunError, match="cuda does not run the kernels"):
        kernel_tuning.gpu_timer(1, N, K, kind)
    assert "compute capability is 7.5" in caplog.text


def test_other_errors_end_the_tuning(pretend_cuda, kind, monkeypatch):
    monkeypatch.setattr(packed_triton, "packed_product", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        kernel_tuning.gpu_timer(1, N, K, kind)([choose_launch(1, N, K, 128, "default")])


def kernels_of_a_step(log, layers):
    """Kernels in the captured decode step of each contender, by name."""
    model_shapes.MODEL_SHAPES["tiny"] = ModelShape(256, layers, 8, 2, 32, 512, 1024)
    contenders = made_contenders("tiny", "bf16", torch.device("cuda"))
    found = {}
    for name, model in contenders.decode.items():
        list(filled_batch(model, 2, 100, 10).turns())
        found[name] = log.graphs[-1].kernels
        assert not log.graphs[-1].missed
    return found


@pytest.fixture
def layer_kernels(pretend_cuda, monkeypatch):
    """Kernels that one more layer adds to a step, by contender."""
    monkeypatch.setitem(model_shapes.MODEL_SHAPES, "tiny", None)
    fewer, more = (kernels_of_a_step(pretend_cuda, layers) for layers in (2, 3))
    return {name: more[name] - fewer[name] for name in more}


def test_both_sides_merge_their_projections(layer_kernels):
    products = {name: kernels["aten::linear"] + kernels["aten::mm"] for name, kernels in layer_kernels.items()}
    int4 = {name: kernels["triton::packed_matmul"] for name, kernels in layer_kernels.items()}
    assert products == {SUN: 4, "qsun": 0}
    assert int4 == {SUN: 0, "qsun": 4}
