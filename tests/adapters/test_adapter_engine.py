"""The engine with many adapters on one set of prefill weights: every token is that of the merged module alone."""

import itertools
import random
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsun
from qsun.adapters.adapter_module import AdapterLibrary
from qsun.adapters.adapter_weights import AdapterWeights
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Refused, Request
from qsun.engine.state import ModelState
from tests.adapter_rig import merged
from tests.engine_rig import KV_BYTES_PER_TOKEN, run_until_idle, tokens_of
from tests.places import ROOT
from tests.seam_oracle import greedy_reference


@pytest.fixture
def make_engine(adapters):
    """Factory: an engine over a decode directory with sixteen adapters, and the base as "base"."""

    def make(directory, tuned_on="base", count=16, kv_tokens=50_000, **settings):
        decode = qsun.load_decode(directory, "cpu", "float32")
        engine = Engine(decode, EngineConfig(kv_bytes=kv_tokens * KV_BYTES_PER_TOKEN, **settings))
        library = AdapterLibrary(decode)
        for name, path in list(adapters(tuned_on).items())[:count]:
            engine.add_module(name, library.open(path))
        engine.add_module("base", library.plain())
        return engine

    return make


def first_turns(count, names, seed=0, longest=110):
    """Requests of all lengths; a third begin as an earlier one does, which may be another model's."""
    rng = random.Random(seed)
    lengths = [1, 2, 32, 33, 64, 65, *(rng.randrange(1, longest) for _ in range(count))]
    prompts, requests = [], []
    for i in range(count):
        tokens = [rng.randrange(3, 128) for _ in range(lengths[i])]
        if prompts and i % 3 == 0:
            before = rng.choice(prompts)
            tokens = before[: rng.choice([32, 64, len(before)])] + tokens
        prompts.append(tokens)
        settings = Sampling(max_new_tokens=rng.randrange(1, 24), ignore_eos=True)
        requests.append(Request(f"r{i}", names[i % len(names)], tuple(tokens), settings))
    return requests


def run_conversations(engine, requests):
    """Run them at once; every second goes on with its answer and more as soon as it has ended. Returns all of them."""
    engine.submit(*requests)
    running, answers = {request.id: request for request in requests}, {}
    while not engine.idle:
        for update in engine.step():
            answers.setdefault(update.request, []).extend(update.tokens)
            request = running[update.request]
            if update.finish and request.id.startswith("r") and int(request.id[1:]) % 2:
                tokens = (*request.tokens, *answers[request.id], 7, 8, 9)
                follow = Request(f"again-{request.id}", request.model, tokens, Sampling(9, ignore_eos=True))
                running[follow.id] = follow
                engine.submit(follow)
    return [(running[name], tokens) for name, tokens in answers.items()]


def references(engine, adapters, base_directory, tuned_on):
    """Full modules by name, merged."""
    weights = engine.decode.model if tuned_on == "decode" else qsun.load_decode(base_directory, "cpu", "float32").model
    made = {name: merged(weights, path) for name, path in adapters(tuned_on).items()}
    return made | {"base": qsun.PrefillModule(weights, base_directory)}


def alone(request, module, decode):
    settings = {"max_new_tokens": request.sampling.max_new_tokens, "eos": ()}
    return qsun.generate(module, decode, [list(request.tokens)], **settings)[0]


SMALL = {"max_batch": 24, "kv_tokens": 2400, "prefix_bytes": 40 * 32 * KV_BYTES_PER_TOKEN, "max_adapters": 3}


@pytest.mark.parametrize(
    ("quantize", "tuned_on", "settings"),
    [
        (False, "base", {"max_batch": 64, "prefill_tokens": 4096}),
        (False, "base", SMALL),
        (True, "base", SMALL),
        (True, "decode", SMALL),
        pytest.param(True, "decode", {**SMALL, "max_adapters": 1, "prefill_tokens": 16}, marks=pytest.mark.slow),
        pytest.param(True, "base", {**SMALL, "partitioned": True, "kv_tokens": 17 * 240}, marks=pytest.mark.slow),
    ],
    ids=["all at once", "small", "int4", "int4 for both", "one at a time", "partitioned"],
)
def test_tokens_are_those_of_merged_modules(
    quantize, tuned_on, settings, make_engine, adapters, base_directory, quantized
):
    engine = make_engine(quantized if quantize else base_directory, tuned_on, **settings)
    requests = first_turns(64, [*adapters(tuned_on), "base"], seed=len(settings))
    answers = run_conversations(engine, requests)
    assert len(answers) == 96
    modules = references(engine, adapters, base_directory, tuned_on)
    for request, tokens in answers:
        assert tokens == alone(request, modules[request.model], engine.decode), request
    state = engine.state
    assert state.adapters <= engine.config.max_adapters
    assert state.adapter_loads - state.adapter_evictions == state.adapters
    assert state.prefix_hits > 0


def test_prompts_of_sixteen_adapters_are_read_in_one_pass(make_engine, base_directory, monkeypatch):
    from qsun.engine import prefilling

    sizes, original = [], prefilling.prefilled_rows
    monkeypatch.setattr(
        prefilling, "prefilled_rows", lambda model, rows, chunk: sizes.append(len(rows)) or original(model, rows, chunk)
    )
    engine = make_engine(base_directory)
    requests = [Request(f"{i}", f"task{i}", tuple(range(3, 20)), Sampling(4)) for i in range(16)]
    engine.submit(*requests, Request("b", "base", tuple(range(3, 20)), Sampling(4)))
    run_until_idle(engine)  # loads them
    sizes.clear()
    engine.submit(*requests, Request("b", "base", tuple(range(3, 20)), Sampling(4)))
    run_until_idle(engine)
    assert sizes == [17]


def test_a_first_request_that_waits_for_its_adapter_with_drafts(make_engine, adapters, base_directory):
    request = Request("a", "task0", tuple(range(3, 20)), Sampling(12))
    engine = make_engine(base_directory, speculate=4)
    engine.submit(request)
    tokens = tokens_of(run_until_idle(engine)["a"])
    module = references(engine, adapters, base_directory, "base")["task0"]
    assert tokens == alone(request, module, engine.decode)


def test_tokens_are_those_of_the_seam_written_out(make_engine, adapters, base_directory):
    engine = make_engine(base_directory, max_adapters=2)
    names = ["task0", "task3", "base"]
    modules = references(engine, adapters, base_directory, "base")
    decode = {name: tensor.double() for name, tensor in engine.decode.model.state_dict().items()}
    for name, length in itertools.product(names, (1, 2, 40)):
        prompt = [3 + (5 * i + length) % 120 for i in range(length)]
        engine.submit(Request("r", name, tuple(prompt), Sampling(6, ignore_eos=True)))
        prefill = {key: tensor.double() for key, tensor in modules[name].model.state_dict().items()}
        expected = greedy_reference(prefill, decode, engine.decode.model.config, prompt, 6)
        assert tokens_of(run_until_idle(engine)["r"]) == expected


def tensor_bytes(*roots):
    """Bytes of all different tensors of modules and adapters."""
    tensors = {}
    for root in roots:
        found = root.layers.values() if isinstance(root, AdapterWeights) else [[*root.parameters(), *root.buffers()]]
        for tensor in itertools.chain(*found):
            tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(tensors.values())


@pytest.mark.parametrize("tuned_on", ["base", "decode"])
def test_adapters_cost_their_own_bytes(tuned_on, make_engine, adapters, base_directory, quantized):
    engine = make_engine(quantized, tuned_on)
    for name in adapters(tuned_on):
        engine.submit(Request(name, name, (5, 6, 7), Sampling(2)))
    run_until_idle(engine)
    decode, base = engine.decode.model, qsun.load_decode(base_directory, "cpu", "float32").model
    on_disk = sum((path / "adapter_model.safetensors").stat().st_size for path in adapters(tuned_on).values())
    loaded = [engine.adapters._here[engine.modules[name].number] for name in adapters(tuned_on)]
    models = [decode, *(owner.module.model for owner in engine.modules.values())]
    held = tensor_bytes(*models, *loaded)
    assert engine.state.adapter_bytes == tensor_bytes(*loaded) <= 1.1 * on_disk
    rotary = 1024  # frequencies
    assert held <= tensor_bytes(decode) + (tuned_on == "base") * tensor_bytes(base) + 1.1 * on_disk + rotary


def test_the_same_prompt_to_all_shares_nothing(make_engine, adapters, base_directory):
    engine = make_engine(base_directory, max_adapters=2)
    modules = references(engine, adapters, base_directory, "base")
    prompt, answers = tuple(random.Random(6).randrange(3, 128) for _ in range(65)), set()
    for turn in range(2):  # the second turn finds the first one's prefixes, of adapters that were evicted meanwhile
        for name in modules:
            request = Request(name, name, prompt, Sampling(12, ignore_eos=True))
            engine.submit(request)
            updates = run_until_idle(engine)[name]
            assert updates[0].cached_tokens == (64 if turn else 0)
            assert tokens_of(updates) == alone(request, modules[name], engine.decode)
            answers.add(tuple(tokens_of(updates)))
    assert len(answers) > 14
    assert engine.state.adapter_evictions > 16


def test_an_adapter_that_many_ask_for_does_not_keep_another_out(make_engine, base_directory):
    engine = make_engine(base_directory, max_adapters=1, max_batch=4, prefix_bytes=0)
    serial = itertools.count()

    def more():
        while engine.state.models["task0"].waiting < 8:
            engine.submit(Request(f"busy{next(serial)}", "task0", tuple(range(3, 60)), Sampling(3)))

    more()
    for _ in range(5):
        engine.step()
    engine.submit(Request("rare", "task1", tuple(range(3, 60)), Sampling(3)))
    for _ in range(200):
        more()
        if any(update.request == "rare" and update.finish for update in engine.step()):
            return
    raise AssertionError("it waits for ever")


def test_an_adapter_stays_while_its_prompt_is_read(make_engine, base_directory):
    engine = make_engine(base_directory, max_adapters=1, prefill_tokens=8, prefix_bytes=0)
    engine.submit(Request("long", "task0", tuple(range(3, 103)), Sampling(4, ignore_eos=True)))
    while not engine.state.models["task0"].prefilling:
        engine.step()
    engine.submit(Request("other", "task1", (5, 6, 7), Sampling(4, ignore_eos=True)))
    engine.submit(Request("base", "base", (5, 6, 7), Sampling(2, ignore_eos=True)))
    ended = []
    while engine.state.models["task0"].prefilling:
        ended += [update.request for update in engine.step() if update.finish]
        assert (engine.state.adapters, engine.state.adapter_loads) == (1, 1)
    assert ended == ["base"]  # which needs no adapter, and did not wait
    assert len(tokens_of(run_until_idle(engine)["other"])) == 4
    assert engine.state.adapter_evictions == 1


def test_decode_steps_go_on_while_an_adapter_is_loaded(make_engine, base_directory, monkeypatch):
    engine = make_engine(base_directory)
    engine.submit(Request("talks", "base", (5, 6), Sampling(60, ignore_eos=True)))
    engine.step()
    slow, load = threading.Event(), qsun.adapters.adapter_module.AdapterModule.load
    monkeypatch.setattr(qsun.adapters.adapter_module.AdapterModule, "load", lambda self: slow.wait(30) and load(self))
    engine.submit(Request("new", "task0", (5, 6, 7), Sampling(2, ignore_eos=True)))
    for _ in range(20):
        assert [update.request for update in engine.step()] == ["talks"]
    slow.set()
    assert len(tokens_of(run_until_idle(engine)["new"])) == 2


def test_an_adapter_that_is_loaded_for_a_waiting_request_is_taken_though_another_model_is_next(
    make_engine, base_directory, monkeypatch
):
    """While task0's adapter loads, task1 comes to be the least served: neither may wait for the other for ever."""
    engine = make_engine(base_directory, max_adapters=1, prefix_bytes=0)
    engine.submit(Request("long", "task0", (5, 6, 7), Sampling(90, ignore_eos=True)))
    while not engine.state.models["task0"].decoding:
        engine.step()
    engine.submit(Request("other", "task1", (5, 6, 7), Sampling(2, ignore_eos=True)))
    while engine.state.models["task1"] != ModelState():
        engine.step()
    slow, load = threading.Event(), qsun.adapters.adapter_module.AdapterModule.load
    monkeypatch.setattr(qsun.adapters.adapter_module.AdapterModule, "load", lambda self: slow.wait(30) and load(self))
    engine.submit(Request("more", "task0", (5, 6, 7), Sampling(2, ignore_eos=True)))
    engine.step()
    engine.submit(Request("again", "task1", (5, 6, 7), Sampling(2, ignore_eos=True)))
    engine.step()
    engine.step()
    slow.set()
    answers = run_until_idle(engine, 500)
    assert [len(tokens_of(answers[name])) for name in ("more", "again")] == [2, 2]


def test_a_request_that_is_cancelled_while_its_adapter_loads_holds_no_place(make_engine, base_directory, monkeypatch):
    engine = make_engine(base_directory, max_adapters=1)
    slow, load = threading.Event(), qsun.adapters.adapter_module.AdapterModule.load
    monkeypatch.setattr(qsun.adapters.adapter_module.AdapterModule, "load", lambda self: slow.wait(30) and load(self))
    engine.submit(Request("gone", "task0", (5, 6, 7), Sampling(2)))
    engine.step()
    engine.cancel("gone")
    slow.set()
    engine.submit(Request("next", "task1", (5, 6, 7), Sampling(2, ignore_eos=True)))
    assert len(tokens_of(run_until_idle(engine)["next"])) == 2


def test_a_model_that_is_removed_while_its_adapter_is_in_use(make_engine, adapters, base_directory):
    engine = make_engine(base_directory, prefill_tokens=8)
    request = Request("a", "task0", tuple(range(3, 60)), Sampling(5, ignore_eos=True))
    engine.submit(request)
    while not engine.state.models["task0"].prefilling:
        engine.step()
    engine.remove_module("task0")
    with pytest.raises(Refused, match="being removed"):
        engine.submit(Request("b", "task0", (5, 6)))
    module = references(engine, adapters, base_directory, "base")["task0"]
    assert tokens_of(run_until_idle(engine)["a"]) == alone(request, module, engine.decode)
    assert "task0" not in engine.state.models
    assert engine.state.adapters == 0
    # another adapter under its name finds nothing of it
    engine.add_module("task0", AdapterLibrary(engine.decode).open(adapters()["task3"]))
    engine.submit(request)
    updates = run_until_idle(engine)["a"]
    module = references(engine, adapters, base_directory, "base")["task3"]
    assert updates[0].cached_tokens == 0
    assert tokens_of(updates) == alone(request, module, engine.decode)


def test_an_adapter_that_cannot_be_read_fails_its_own_requests_only(
    make_engine, adapters, base_directory, tmp_path, caplog
):
    engine = make_engine(base_directory, count=2)
    library = AdapterLibrary(engine.decode)
    for name in ("changed", "gone", "nan"):
        shutil.copytree(adapters()["task0"], tmp_path / name)
    weights = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(weights)
    broken = next(name for name in tensors if "layers.1" in name)
    tensors[broken][0, 0] = float("nan")
    save_file(tensors, weights)
    for name in ("changed", "gone", "nan"):
        engine.add_module(name, library.open(tmp_path / name))
    weights = tmp_path / "changed" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    shutil.rmtree(tmp_path / "gone")
    for name in ("changed", "gone", "nan", "task0", "base"):
        engine.submit(*(Request(f"{name}{i}", name, (5, 6, 7), Sampling(3, ignore_eos=True)) for i in range(2)))
    updates = run_until_idle(engine)
    for name, says in {
        "changed": "has changed since it was added; remove it and add it again",
        "gone": "cannot be read: No such file",
        "nan": "model.layers.1.",
    }.items():
        (message,) = (message for message in caplog.messages if f"/{name}" in message)
        assert says in message
        assert "\n" not in message
        for i in range(2):
            (update,) = updates[f"{name}{i}"]
            assert update.finish == "error"
            assert update.error == "the model's adapter could not be loaded; the server's log says why"
    assert all(len(tokens_of(updates[name])) == 3 for name in ("task00", "task01", "base0", "base1"))
    assert engine.state.models["nan"].waiting == 0
    shutil.copytree(adapters()["task0"], tmp_path / "gone")  # as it was: the failure is not remembered
    engine.submit(Request("again", "gone", (5, 6, 7), Sampling(3, ignore_eos=True)))
    assert tokens_of(run_until_idle(engine)["again"]) == tokens_of(updates["task00"])


def test_shared_weights_go_with_the_last_adapter(make_engine, adapters, base_directory, quantized):
    decode = qsun.load_decode(quantized, "cpu", "float32")
    engine, library = Engine(decode, EngineConfig(kv_bytes=500 * KV_BYTES_PER_TOKEN)), AdapterLibrary(decode)
    paths = adapters("base")
    for name in ("task0", "task1"):
        engine.add_module(name, library.open(paths[name]))
    shared = weakref.ref(engine.modules["task0"].module.shared)
    weight = weakref.ref(shared().model.model.layers[0].self_attn.q_proj.layer.weight)
    engine.submit(*(Request(name, name, (5, 6, 7), Sampling(3, ignore_eos=True)) for name in ("task0", "task1")))
    engine.step()
    engine.remove_module("task0")
    engine.remove_module("task1")
    assert weight() is not None  # its requests are not done
    answers = run_until_idle(engine)
    assert weight() is None
    assert shared() is None
    engine.add_module("again", library.open(paths["task1"]))
    engine.submit(Request("again", "again", (5, 6, 7), Sampling(3, ignore_eos=True)))
    assert tokens_of(run_until_idle(engine)["again"]) == tokens_of(answers["task1"])


def test_a_process_does_not_finish_queued_loads_before_it_exits(adapters, base_directory):
    """One is being loaded, others wait: the process ends once that one is loaded."""
    code = f"""
import time, threading, qsun
from qsun.adapters.adapter_module import AdapterLibrary, AdapterModule
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.engine.thread import EngineThread
decode = qsun.load_decode({str(base_directory)!r}, "cpu", "float32")
engine, library = Engine(decode, EngineConfig(kv_bytes=1 << 20)), AdapterLibrary(decode)
started = threading.Event()
def load(self):
    print("loads", flush=True)
    started.set()
    time.sleep(1)
AdapterModule.load = load
for name, path in { ({name: str(path) for name, path in adapters().items()})!r}.items():
    engine.add_module(name, library.open(path))
    engine.submit(Request(name, name, (5, 6, 7), Sampling(2)))
thread = EngineThread(engine)
thread.start()
started.wait(60)
time.sleep(0.3)
assert engine.state.adapters == 0
thread.stop()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["loads"]


def test_generate_takes_them_as_prefill_modules(adapters, base_directory):
    decode = qsun.load_decode(base_directory, "cpu", "float32")
    library = qsun.AdapterLibrary(decode)
    names = ["task0", "task1", "task0"]
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10]]
    found = qsun.generate([library.open(adapters()[name]) for name in names], decode, prompts, max_new_tokens=5, eos=())
    for name, prompt, answer in zip(names, prompts, found, strict=True):
        module = merged(decode.model, adapters()[name])
        assert answer == qsun.generate(module, decode, [prompt], max_new_tokens=5, eos=())[0]
    assert found[0] != found[1]
    assert torch.is_tensor(next(decode.model.parameters()))
