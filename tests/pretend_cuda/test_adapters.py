"""Adapters of many ranks on a pretended CUDA device: the grouped kernels, two launches a layer, the right tokens."""

import copy
import gc
import weakref
from collections import Counter
from concurrent.futures import Future

import pytest
import torch

import qsun
from qsun.adapters import pool
from qsun.adapters.adapter_module import AdapterLibrary
from qsun.adapters.shared_prefill import SharedPrefill
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.engine.warming import warm
from qsun.runtime.fused_projections import merge_projections
from qsun.runtime.seam import prefilled_rows
from tests.adapter_rig import KINDS, merged, write_adapter
from tests.engine_rig import run_until_idle, tokens_of
from tests.pretend_cuda.test_graphs import signatures

RANKS = (1, 4, 16, 33)
PROMPTS = ((5, 6, 7), tuple(range(3, 40)), (9,), (8, 8), tuple(range(50, 70)), (4, 5, 6, 7))
NAMES = ("base", "task0", "task1", "task2", "task3", "task0")
GROUPED = ("shrink_rows", "expand_rows")


@pytest.fixture
def paths(tiny_model, tmp_path):
    base = tiny_model("llama")
    return {
        f"task{i}": write_adapter(tmp_path / f"task{i}", base, i, rank, kind)
        for i, (rank, kind) in enumerate(zip(RANKS, KINDS, strict=True))
    }


class InThisThread:
    """Loads adapters at once: the pretended device belongs to one thread."""

    def __init__(self, *_):
        pass

    def submit(self, load):
        done = Future()
        done.set_result(load())
        return done


@pytest.fixture
def expected(tiny_model, paths):
    decode = qsun.load_decode(tiny_model("llama"), "cpu", torch.float32)
    modules = {name: merged(decode.model, path) for name, path in paths.items()}
    modules["base"] = qsun.PrefillModule(decode.model, decode.directory)
    return [
        qsun.generate(modules[name], decode, [list(prompt)], max_new_tokens=6, eos=())[0]
        for name, prompt in zip(NAMES, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("together", [True, False], ids=["one pass", "pieces"])
def test_tokens_are_those_of_merged_modules(tiny_model, paths, expected, device, together, pretend_cuda, monkeypatch):
    monkeypatch.setattr(pool, "ThreadPoolExecutor", InThisThread)
    decode = qsun.load_decode(tiny_model("llama"), device, torch.float32)
    library = AdapterLibrary(decode)
    engine = Engine(decode, EngineConfig(kv_bytes=1 << 20, prefill_tokens=4096 if together else 4))
    for name, path in paths.items():
        engine.add_module(name, library.open(path))
    engine.add_module("base", library.plain())
    for number, (name, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True)):
        engine.submit(Request(str(number), name, prompt, Sampling(max_new_tokens=6, ignore_eos=True)))
    found = run_until_idle(engine)
    assert [tokens_of(found[str(number)]) for number in range(len(NAMES))] == expected
    launched = Counter(launch["kernel"] for launch in pretend_cuda.launches)
    assert launched["shrink_rows"] == launched["expand_rows"] > 0
    assert not any(name in graph.kernels for graph in pretend_cuda.graphs for name in map("triton::{}".format, GROUPED))


@pytest.fixture
def quantized(tiny_model, tmp_path):
    """An int4 decode module, and the same adapters of its own weights."""
    base, out = tiny_model("llama"), tmp_path / "int4"
    qsun.quantize(base, out, qsun.QuantConfig(method="rtn", group_size=32, dtype="bfloat16"), device="cpu")
    kinds = enumerate(zip(RANKS, KINDS, strict=True))
    return out, [write_adapter(tmp_path / f"own{i}", base, i, rank, kind, out) for i, (rank, kind) in kinds]


@pytest.mark.parametrize("weights", ["plain", "merged projections", "int4"])
def test_two_launches_a_layer(tiny_model, paths, quantized, weights, pretend_cuda):
    directory, adapters = quantized if weights == "int4" else (tiny_model("llama"), paths.values())
    decode = qsun.load_decode(directory, "cuda", torch.bfloat16)
    library = AdapterLibrary(decode)
    modules = [library.open(path) for path in adapters]
    shared, loaded = modules[0].shared, [module.load() for module in modules]
    prompts = [list(range(3, 3 + length)) for length in (9, 4, 20, 13, 7)]

    def written(rows):
        pretend_cuda.launches.clear()
        with torch.no_grad(), shared.rows(rows):
            layers = list(prefilled_rows(shared.model, prompts, 64))
        return torch.cat([torch.cat([k.flatten(), v.flatten()]).cpu() for row in layers for k, v in row])

    if weights == "merged projections":
        model = copy.deepcopy(decode.model)
        merge_projections(model, model.config, dense=True)
        shared = SharedPrefill(model)
    rows = [None, *loaded]
    kv, launches = written(rows), list(pretend_cuda.launches)
    names = [launch["kernel"] for launch in launches if launch["kernel"] in GROUPED]
    layers = len(decode.model.model.layers) * 7 - 4  # of the last block, nothing after its KV is computed
    assert names == [*GROUPED] * layers
    shared._adapters._in_kernel = False  # the torch path, on the same device
    shared._adapters.use = lambda runs, device: setattr(shared._adapters, "_runs", runs)
    assert (kv.float() - written(rows).float()).norm() < 0.01 * kv.float().norm()
    assert not any(launch["kernel"] in GROUPED for launch in pretend_cuda.launches)
    assert (kv.float() - written([None] * 5).float()).norm() > 0.1 * kv.float().norm()


@pytest.mark.parametrize("weights", ["plain", "int4"])
def test_nothing_is_compiled_after_warming(tiny_model, paths, quantized, weights, pretend_cuda, monkeypatch):
    monkeypatch.setattr(pool, "ThreadPoolExecutor", InThisThread)
    directory, adapters = quantized if weights == "int4" else (tiny_model("llama"), paths.values())
    decode = qsun.load_decode(directory, "cuda", torch.bfloat16)
    library = AdapterLibrary(decode)
    engine = Engine(decode, EngineConfig(kv_bytes=1 << 20, max_batch=4))
    for number, path in enumerate(adapters):
        engine.add_module(f"task{number}", library.open(path))
    engine.add_module("base", library.plain())
    warm(engine)
    compiled = signatures(pretend_cuda.launches)
    pretend_cuda.launches.clear()
    prompts = [*PROMPTS, tuple(range(1, 120)), tuple(range(1, 90))]
    for number, (name, prompt) in enumerate(zip([*NAMES, "task3", "base"], prompts, strict=True)):
        engine.submit(Request(str(number), name, prompt, Sampling(max_new_tokens=3, ignore_eos=True)))
    run_until_idle(engine)
    launched = signatures(pretend_cuda.launches)
    assert {"shrink_rows", "expand_rows"} <= {each[0] for each in launched}
    assert set(launched) <= set(compiled)


def test_an_adapter_is_let_go_of_after_its_pass(tiny_model, paths, pretend_cuda):
    decode = qsun.load_decode(tiny_model("llama"), "cuda", torch.float32)
    module = AdapterLibrary(decode).open(paths["task0"])
    adapter = module.load()
    with torch.no_grad(), module.shared.rows([adapter]):
        list(prefilled_rows(module.shared.model, [[5, 6, 7]], 64))
    assert any(launch["kernel"] in GROUPED for launch in pretend_cuda.launches)
    held = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert held() is None


def test_ranks_beyond_the_kernel_go_one_by_one(tiny_model, tmp_path, pretend_cuda):
    base = tiny_model("llama")
    decode = qsun.load_decode(base, "cuda", torch.float32)
    library = AdapterLibrary(decode)
    module = library.open(write_adapter(tmp_path / "wide", base, 0, 300, ["q_proj"]))
    with torch.no_grad(), module.shared.rows([module.load()]):
        list(prefilled_rows(module.shared.model, [[5, 6, 7]], 64))
    assert not any(launch["kernel"] in GROUPED for launch in pretend_cuda.launches)
