"""CUDA graphs on a pretended machine: captured before requests come, shared by `generate` and engines, one pool."""

import gc
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import qsun
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.decode import graph_pool, slot_memory
from qsun.engine.decode.slot_memory import free_tokens
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.engine.warming import warm
from qsun.eval.speed.clock import interleaved
from qsun.runtime.kv_cache import kv_bytes_per_token
from qsun.runtime.quant_linear import QuantLinear
from tests.engine_rig import run_until_idle, tokens_of

PROMPTS = [[5, 6, 7], list(range(3, 40)), [9], [11, 12]]


@pytest.fixture
def expected(tiny_model):
    return answers(tiny_model("llama"), "cpu")


@pytest.fixture(autouse=True)
def own_pools(monkeypatch):
    monkeypatch.setattr(graph_pool, "_pools", {})
    monkeypatch.setattr(graph_pool, "_sides", {})


def loaded(directory, device):
    decode = qsun.load_decode(directory, device, torch.float32)
    return qsun.load_prefill(directory, decode), decode


def generate(modules, prompts=PROMPTS, **settings):
    return qsun.generate(*modules, prompts, **({"max_new_tokens": 6, "eos": ()} | settings))


def answers(directory, device):
    return generate(loaded(directory, device))


def engine_of(modules, **settings):
    prefill, decode = modules
    engine = Engine(decode, EngineConfig(**({"kv_bytes": 1 << 20, "max_batch": 8} | settings)))
    engine.add_module("m", prefill)
    return engine


def run(engine, prompts=PROMPTS, new_tokens=6):
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    engine.submit(*(Request(str(number), "m", tuple(p), sampling) for number, p in enumerate(prompts)))
    found = run_until_idle(engine)
    return [tokens_of(found[str(number)]) for number in range(len(prompts))]


def test_generate_and_engines_share_graphs(expected, tiny_model, pretend_cuda):
    modules = loaded(tiny_model("llama"), "cuda")
    assert generate(modules) == expected
    captured = len(pretend_cuda.graphs)
    assert captured
    assert generate(modules) == expected
    assert generate(modules, [*reversed(PROMPTS)]) == [*reversed(expected)]
    assert run(engine_of(modules, kv_bytes=256 << 10)) == expected
    assert len(pretend_cuda.graphs) == captured


def test_an_engine_of_its_own_budget_frees_what_generate_left(expected, tiny_model, pretend_cuda, monkeypatch):
    modules = loaded(tiny_model("llama"), "cuda")
    assert generate(modules) == expected
    gc.collect()
    left = free_tokens(modules[1].model)
    found = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(free_tokens(modules[1].model)))
    engine = engine_of(modules, kv_bytes=256 << 10)
    assert free_tokens(modules[1].model) == left > 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4 << 18, 140 << 30))
    engine = engine_of(modules, kv_bytes=0)
    assert found == [0]
    assert run(engine) == expected


def test_engines_at_the_same_time_do_not(expected, tiny_model, pretend_cuda):
    modules = loaded(tiny_model("llama"), "cuda")
    first, second = (engine_of(modules, kv_bytes=256 << 10) for _ in range(2))
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    for engine, prompts in ((first, PROMPTS), (second, PROMPTS[::-1])):
        engine.submit(*(Request(str(number), "m", tuple(p), sampling) for number, p in enumerate(prompts)))
    updates = {first: [], second: []}
    while not (first.idle and second.idle):
        for engine in updates:
            updates[engine] += engine.step()
    for engine, wanted in ((first, expected), (second, expected[::-1])):
        tokens = [[t for u in updates[engine] if u.request == str(n) for t in u.tokens] for n in range(4)]
        assert tokens == wanted
    assert first.batch_of("m").cache.memory is not second.batch_of("m").cache.memory


def test_graphs_hold_after_a_move_that_moves_nothing(tiny_model, tmp_path, pretend_cuda):
    """8-bit layers are multiplied by dequantized copies, whose addresses the graphs have."""
    qsun.quantize(tiny_model("llama"), tmp_path / "q", qsun.QuantConfig(method="rtn", bits=8, group_size=32))
    decode = qsun.load_decode(tmp_path / "q", "cuda", torch.float32, keep_dense=True)
    modules = qsun.PrefillModule(decode.model, tmp_path / "q"), decode
    wanted, captured = generate(modules), len(pretend_cuda.graphs)
    copies = [m._dense.data_ptr() for m in decode.model.modules() if isinstance(m, QuantLinear)]
    decode.model.to("cuda")
    assert generate(modules) == wanted
    assert len(pretend_cuda.graphs) == captured > 0
    assert [m._dense.data_ptr() for m in decode.model.modules() if isinstance(m, QuantLinear)] == copies


def signatures(launches):
    """What Triton would compile for: kernels, constants, and the shapes of packed weights, which choose launches."""
    plain = (bool, int, str, float)
    found = []
    for each in launches:
        constants = [(k, v) for k, v in each.items() if k not in ("grid", "args") and isinstance(v, plain)]
        packed = [tuple(tensor.shape) for tensor in each["args"] if getattr(tensor, "dtype", None) is torch.int16]
        found.append((each["kernel"], *sorted(constants), *packed))
    return Counter(found)


@pytest.mark.parametrize(
    ("bits", "fuse", "pass_tokens", "kv_dtype"),
    [(None, False, 2048, "auto"), (4, True, 2048, "auto"), (4, True, 2048, "fp8"), (4, False, 48, "auto")],
    ids=str,
)
def test_nothing_is_captured_or_compiled_after_warming(
    bits, fuse, pass_tokens, kv_dtype, tiny_model, pretend_cuda, tmp_path
):
    """Requests come and go, short and long, up to the budget and to max_batch; int4 modules also read and score."""
    directory = tiny_model("llama", max_position_embeddings=600, head_dim=64)
    if bits:
        qsun.quantize(directory, tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32, dtype="bfloat16"))
    decode = qsun.load_decode(tmp_path / "q" if bits else directory, "cuda", torch.bfloat16, fuse=fuse)
    prefill = qsun.PrefillModule(decode.model, decode.directory)
    kv_bytes = 1500 * kv_bytes_per_token(decode.model.config, torch.bfloat16, kv_dtype)
    engine = engine_of((prefill, decode), kv_bytes=kv_bytes, max_batch=4, pass_tokens=pass_tokens, kv_dtype=kv_dtype)
    assert warm(engine) == len(pretend_cuda.graphs) >= 7
    compiled, captured = signatures(pretend_cuda.launches), len(pretend_cuda.graphs)
    pretend_cuda.launches.clear()
    sampling = {"ignore_eos": True, "detokenize": False, "prompt_logprobs": 0}
    lengths = [(3, 2), (300, 4), (420, 3), (40, 6), (1, 3), (7, 2), (590, 4), (280, 3)]
    shapes = set()
    for number, (prompt, new) in enumerate(lengths):
        tokens = tuple(1 + n % 50 for n in range(prompt))
        engine.submit(Request(str(number), "m", tokens, Sampling(max_new_tokens=new, **sampling)))
        engine.step()
        shapes.add(engine.batch_of("m").cache.capacity[1])
    while not engine.idle:
        engine.step()
        shapes.add(engine.batch_of("m").cache.capacity[1])
    assert len(shapes) > 1
    assert len(pretend_cuda.graphs) == captured
    launched = set(signatures(pretend_cuda.launches))
    assert launched <= set(compiled)
    assert len(launched) > 2 or not bits  # products of several launches
    own = {each[0] for each in compiled if ("FP8", kv_dtype == "fp8") in each}
    assert own == ({"split_attention", "rotate_and_store"} if fuse else set())
    assert len({id(graph) for graph in pretend_cuda.graphs}) == captured


def test_warming_does_nothing_on_a_cpu(tiny_model):
    assert warm(engine_of(loaded(tiny_model("llama"), "cpu"))) == 0


def test_a_server_warms_before_it_listens(tiny_model, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient")
    from qsun.serve.api import app
    from qsun.serve.api.completions import ServeLimits
    from qsun.serve.api.metrics import Metrics

    metrics = Metrics()
    prefill, decode = loaded(tiny_model("llama"), "cpu")
    engine = Engine(decode, EngineConfig(kv_bytes=1 << 20, max_batch=2), metrics)
    engine.add_module("m", prefill)
    serving, warmed = app.Serving(engine, metrics, ServeLimits()), []
    monkeypatch.setattr(app, "warm", lambda given: warmed.append((given, serving.thread._thread.is_alive())))
    with testclient.TestClient(app.build_app(serving)) as client:
        assert client.get("/ready").status_code == 200
    assert warmed == [(engine, False)]


def test_graphs_share_a_pool_until_all_are_gone(pretend_cuda, monkeypatch):
    pools, graph = [], torch.cuda.graph

    def watched(captured, pool, **options):
        pools.append(pool)
        return graph(captured, pool=pool, **options)

    monkeypatch.setattr(torch.cuda, "graph", watched)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    device, x = torch.device("cuda", 0), torch.ones(2, device="cuda:0")
    kept = [graph_pool.capture(device, lambda: x.add_(1)) for _ in range(2)]
    assert pools[0] is pools[1]
    other = graph_pool.capture(torch.device("cuda", 1), lambda: torch.ones(1, device="cuda:1").add_(1))
    assert pools[2] is not pools[0]
    del kept
    pretend_cuda.graphs.clear()
    gc.collect()
    again = graph_pool.capture(device, lambda: x.add_(1))
    assert pools[3] is not pools[0]
    del other, again


@pytest.fixture
def product(pretend_cuda, monkeypatch):
    """A function that runs a product as cuBLAS does: its workspace stays with the stream, a graph keeps its address.

    It returns where the workspace lies: "pool" if a capture allocated it.
    """
    held = {}
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", held.clear, raising=False)

    def run(device="cuda:0"):
        capturing = torch.cuda.is_current_stream_capturing()
        return held.setdefault(torch.cuda.current_stream(device), "pool" if capturing else "ordinary memory")

    run.held = held
    return run


@pytest.mark.parametrize("time_it", [False, True], ids=["decode", "clock"])
def test_freeing_one_modules_graphs_leaves_anothers_workspace(product, time_it):
    """When a graph dies torch frees its stream's workspace, and another graph may have that of the same stream."""
    found = []
    for _ in range(2):
        if time_it:
            interleaved({"product": [lambda: found.append(product())]}, torch.device("cuda", 0), rounds=1)
        else:
            graph_pool.capture(torch.device("cuda", 0), lambda: found.append(product()))
        assert found[-1] == "pool"
        assert not product.held  # the next product that is not captured gets a workspace of its own


def test_a_capture_that_fails_leaves_no_workspace_of_its_pool(product):
    def body():
        if product() == "pool":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        graph_pool.capture(torch.device("cuda", 0), body)
    assert not product.held


def test_all_captures_of_a_device_are_on_one_stream(pretend_cuda):
    streams = []
    for index in (0, 1, 0):
        device = torch.device("cuda", index)
        graph_pool.capture(device, lambda device=device: streams.append(torch.cuda.current_stream(device)))
    assert streams[0] is streams[1] is streams[4] is streams[5]
    assert [stream.device.index for stream in streams] == [0, 0, 1, 1, 0, 0]


def test_threads_capture_one_after_the_other(pretend_cuda):
    running, most = [], []

    def body():
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    with ThreadPoolExecutor(2) as threads:
        for each in [threads.submit(graph_pool.capture, torch.device("cuda", index), body) for index in range(2)]:
            each.result()
    assert most == [1] * 4


def test_fp8_gives_the_cpus_tokens(tiny_model, pretend_cuda):
    """Of blocks that are not fused; fused ones are below."""
    directory, found = tiny_model("llama"), []
    for device in ("cpu", "cuda"):
        decode = qsun.load_decode(directory, device, torch.float32)
        found.append(generate((qsun.load_prefill(directory, decode), decode), kv_dtype="fp8"))
    assert found[0] == found[1]
    held = {flat.dtype for memory in slot_memory._of_models[decode.model] for flat in memory.layers[0]}
    assert held == {torch.uint8, torch.float32}


def test_fp8_in_fused_blocks(tiny_model, pretend_cuda, tmp_path):
    """The tokens of blocks that dequantize all KV first."""
    directory, found = tiny_model("llama", head_dim=64), []
    qsun.quantize(directory, tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32, dtype="bfloat16"))
    for fuse in (False, True):
        pretend_cuda.clear()
        decode = qsun.load_decode(tmp_path / "q", "cuda", torch.bfloat16, fuse=fuse)
        found.append(generate((qsun.load_prefill(directory, decode), decode), max_new_tokens=3, kv_dtype="fp8"))
        kinds = {
            each["FP8"] for each in pretend_cuda.launches if each["kernel"] in ("split_attention", "rotate_and_store")
        }
        assert kinds == ({True} if fuse else set())
    assert found[0] == found[1]
