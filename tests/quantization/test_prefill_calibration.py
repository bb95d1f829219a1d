"""Decode-phase calibration: each layer is calibrated on what it will see behind each task's prefill module."""

import gc
import json
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import qsun
from qsun.data.calibration import Sample
from qsun.demo import base_directory
from qsun.model.architectures import architecture_of
from qsun.model.skeleton import Skeleton
from qsun.quantization import activations as stream_module
from qsun.quantization import block as block_pass
from qsun.quantization import blockwise as walk
from qsun.quantization.job import prepare
from qsun.quantization.methods.moments import Moments
from qsun.quantization.run import run_job
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from tests.quantization.test_resume import interrupt_at, published
from tests.tiny_models import FAMILIES, SEQUENCE, build_model, random_tokens, reference, write_jsonl

#
# Oracle: transformers. A prefill module fills a real DynamicCache with t0 .. t(n-2); the decode module reads the rest
# from that cache, one sample at a time without padding, and hooks see what enters its layers. The decode module is the
# finished one, read back from its files: a layer's input depends on what comes before it only.


@dataclass
class Task:
    """A base, its prefill modules (weights of their own, all of them), and a calibration file for each."""

    base: Path
    sources: list[Path]
    prefills: list[Path]


def talking(directory: Path, family: str, dtype: torch.dtype, seed: int) -> Path:
    build_model(directory, family, dtype, seed)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in base_directory().glob(pattern):
            shutil.copyfile(file, directory / file.name)
    return directory


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Random prompts and responses of many lengths: a first row whose prompt is one token, and one that is cut."""
    texts = ["".join(chr(c) for c in row if c > 31) for row in random_tokens(count, 40, seed)]
    lengths = [(0, 3), (19, 30), (1, 1), *[(2 + 5 * i % 17, 1 + 3 * i % 7) for i in range(count)]]
    rows = [(t[:p], t[p : p + r]) for t, (p, r) in zip(texts, lengths, strict=False)]
    # the tokenizer has no tokens for some characters, and rows with an empty response are left out
    return [{"prompt": p, "response": r if any(map(str.isalnum, r)) else "a"} for p, r in rows]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Factory: task(family, dtype) -> two prefill modules and the base itself, each with its own data."""
    made: dict[Any, Task] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Task:
        if (family, dtype) not in made:
            root = tmp_path_factory.mktemp(family)
            base, first, second = (
                talking(root / name, family, dtype, i) for i, name in enumerate(("base", "P1", "P2"))
            )
            sources = [write_jsonl(root / f"{i}.jsonl", pairs(7, seed=i)) for i in range(3)]
            made[family, dtype] = Task(base, sources, [first, second, base])
        return made[family, dtype]

    return make


def settings(method: str, **changes: Any) -> qsun.QuantConfig:
    defaults: dict[str, Any] = {"method": method, "bits": 3, "group_size": 32, "samples": 21, "seq_len": SEQUENCE}
    return qsun.QuantConfig(**(defaults | changes))


@pytest.fixture
def collected(monkeypatch) -> dict[str, Moments]:
    """What every layer is quantized with, by name."""
    moments: dict[str, Moments] = {}
    original = block_pass.quantize_layers

    def noting(weights: list[Tensor], seen: Moments, *rest: Any) -> Any:
        moments[rest[-1]] = seen
        return original(weights, seen, *rest)

    for module in (block_pass, walk):
        monkeypatch.setattr(module, "quantize_layers", noting)
    return moments


def seen_by_decoder(prefill: Any, decode: Any, names: list[str], sample: Sample) -> dict[str, Tensor]:
    """(decode positions, features): inputs of the named layers, and of every block and what attention adds to it."""
    cache, tokens = DynamicCache(config=decode.config), torch.tensor([sample.tokens])
    if sample.prefill_tokens:
        prefill(tokens[:, : sample.prefill_tokens], use_cache=True, **{CACHE_ARGUMENT: cache})
    seen: dict[str, Tensor] = {}

    def input_of(name: str, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(lambda _, args: seen.__setitem__(name, args[0][0]))

    handles = [input_of(name, decode.get_submodule(name)) for name in names]
    for index, layer in enumerate(decode.model.layers):
        handles.append(input_of(f"block {index}", layer))
        handles.append(
            layer.self_attn.register_forward_hook(
                lambda _, __, out, key=f"attention {index}": seen.__setitem__(key, out[0][0])
            )
        )
    decode(tokens[:, sample.prefill_tokens :], use_cache=True, **{CACHE_ARGUMENT: cache})
    for handle in handles:
        handle.remove()
    return seen


def residual_of(seen: dict[str, Tensor], name: str) -> Tensor | None:
    """What the output of o_proj or down_proj is added to."""
    index = name.split(".")[2] if name.startswith("model.layers.") else ""
    if name.endswith("o_proj"):
        return seen[f"block {index}"]
    return seen[f"block {index}"] + seen[f"attention {index}"] if name.endswith("down_proj") else None


@dataclass
class Expected:
    """Sums in float64 over all samples."""

    gram: Any = 0.0
    drift: Any = 0.0
    missing: Any = None
    tokens: int = 0

    def add(self, name: str, weight: Tensor, added: bool, ours: dict[str, Tensor], full: dict[str, Tensor]) -> None:
        x, x_full = ours[name].double(), full[name].double()
        narrow = name.endswith(("o_proj", "down_proj")) and len(weight) < len(weight.t())
        lacking = (x_full - x) @ weight.double().t() if narrow else None
        self.gram += x.t() @ x
        self.drift = None if narrow else self.drift + (x_full - x).t() @ x
        self.tokens += len(x)
        mine, theirs = residual_of(ours, name), residual_of(full, name)
        if added and mine is not None and theirs is not None:
            gap = (theirs - mine).double()
            lacking = gap if lacking is None else gap + lacking
        if lacking is not None:
            self.missing = lacking.t() @ x + (0 if self.missing is None else self.missing)


def expected_moments(
    base: Path, out: Path, samples: tuple[Sample, ...], prefills: list[Path | None], names: list[str]
) -> dict[str, Expected]:
    """By brute force; prefills[n] is the directory of module number n, and the base reads what has no number."""
    added = architecture_of(json.loads((base / "config.json").read_text())["model_type"]).output_added
    full, ours = reference(base), qsun.load_decode(out, dtype="float32").model
    readers = {None: full} | {number: reference(path) for number, path in enumerate(prefills) if path is not None}
    sums = {name: Expected() for name in names}
    with torch.no_grad():
        for sample in samples:
            states = [seen_by_decoder(readers[sample.module], model, names, sample) for model in (ours, full)]
            for name in names:
                sums[name].add(name, full.get_submodule(name).weight, added, *states)
    return sums


def assert_same(found: Tensor | None, wanted: Tensor, what: str) -> None:
    assert found is not None, what
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert error < 2e-4, f"{what}: relative error {error:.1e}"


def compare(found: dict[str, Moments], expected: dict[str, Expected], drift: bool) -> None:
    assert found.keys() == expected.keys()
    for name, moments in found.items():
        wanted = expected[name]
        assert moments.tokens == wanted.tokens, name
        assert_same(moments.hessian() * moments.tokens, wanted.gram, name)
        for term in ("drift", "missing"):
            ours, theirs = getattr(moments, term), getattr(wanted, term) if drift else None
            assert (ours is None) == (theirs is None), f"{name}, {term}"
            if theirs is not None:
                assert_same(ours, theirs, f"{name}, {term}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "tokens_per_batch"), [("gptq", 4096), ("refined", 70)])
def test_statistics_are_those_of_the_decoder_behind_each_prefill_module(
    family, method, tokens_per_batch, task, collected, monkeypatch, tmp_path
):
    monkeypatch.setattr(stream_module, "TOKENS_PER_BATCH", tokens_per_batch)
    given = task(family)
    head = not FAMILIES[family].get("tie_word_embeddings")
    job = prepare(
        given.base,
        tmp_path / "out",
        settings(method, lm_head=head),
        given.sources,
        "cpu",
        calibration_prefill=given.prefills,
    )
    assert job.calibration is not None and [s.module for s in job.calibration.samples] == [0] * 7 + [1] * 7 + [None] * 7
    run_job(job)
    expected = expected_moments(
        given.base, tmp_path / "out", job.calibration.samples, given.prefills[:2], list(collected)
    )
    refined = method == "refined"
    compare(collected, expected, drift=refined)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_awqs_statistics_too(method, task, collected, tmp_path):
    """The scales are folded before: the finished module's layers see the folded inputs."""
    given = task()
    job = prepare(given.base, tmp_path / "out", settings(method), given.sources, calibration_prefill=given.prefills)
    run_job(job)
    assert job.calibration is not None
    expected = expected_moments(
        given.base, tmp_path / "out", job.calibration.samples, given.prefills[:2], list(collected)
    )
    compare(collected, expected, drift=False)


@pytest.mark.parametrize("wrong", ["swapped", "base"])
def test_the_comparison_sees_the_wrong_prefill_module(wrong, task, collected, tmp_path):
    given = task()
    job = prepare(given.base, tmp_path / "out", settings("gptq"), given.sources, calibration_prefill=given.prefills)
    run_job(job)
    assert job.calibration is not None
    readers = {"swapped": given.prefills[1::-1], "base": [given.base, given.base]}[wrong]
    expected = expected_moments(given.base, tmp_path / "out", job.calibration.samples, readers, list(collected))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(collected[name].hessian() * collected[name].tokens, expected[name].gram, name)
    name = "model.layers.0.self_attn.q_proj"  # nothing has been attended to yet
    assert_same(collected[name].hessian() * collected[name].tokens, expected[name].gram, name)


def test_a_copy_of_the_base_gives_the_bases_own_statistics(task, collected, monkeypatch, tmp_path):
    """The one way through a prefill module's stream, the other through the full-precision stream.

    The two ways sum in another order. A difference in the last bit can round an integer the other way, which later
    layers then see a thousand times enlarged; so the second run takes the integers of the first.
    """
    results: dict[str, Any] = {}
    quantize_layers = block_pass.quantize_layers

    def replayed(weights: list[Tensor], moments: Moments, *rest: Any) -> Any:
        return results.setdefault(rest[-1], quantize_layers(weights, moments, *rest))

    monkeypatch.setattr(block_pass, "quantize_layers", replayed)
    given = task()
    copy = shutil.copytree(given.base, tmp_path / "copy")
    config = settings("refined", bits=8)
    qsun.quantize(given.base, tmp_path / "own", config, given.sources[:1])
    own = dict(collected)
    collected.clear()
    qsun.quantize(given.base, tmp_path / "copied", config, given.sources[:1], calibration_prefill=[copy])
    assert collected.keys() == own.keys()
    for name, moments in collected.items():
        assert_same(moments.hessian(), own[name].hessian().double(), name)


@pytest.mark.parametrize("method", ["gptq", "refined"])
def test_naming_the_base_changes_no_weight(method, task, tmp_path):
    given = task()
    for name, prefills in (("unnamed", ()), ("named", [given.base] * 3)):
        qsun.quantize(given.base, tmp_path / name, settings(method), given.sources, calibration_prefill=prefills)
    unnamed, named = (published(tmp_path / name) for name in ("unnamed", "named"))
    assert unnamed["model.safetensors"] == named["model.safetensors"]
    assert [entry["name"] for entry in json.loads(named["qsun.json"])["prefill_modules"]] == [str(given.base)] * 3
    assert json.loads(unnamed["qsun.json"])["prefill_modules"] == []


def test_a_module_named_for_two_sources_is_opened_once(task, tmp_path):
    given = task()
    twice = [given.prefills[0], given.prefills[1], given.prefills[0]]
    job = prepare(given.base, tmp_path / "out", settings("gptq"), given.sources, calibration_prefill=twice)
    assert (job.prefill.numbers, len(job.prefill.modules)) == ((0, 1, 0), 2)


@pytest.mark.parametrize("method", ["gptq", "refined"])
def test_at_most_one_block_of_the_prefill_modules_is_in_memory(method, task, monkeypatch, tmp_path):
    given = task()
    alive: list[weakref.ref[nn.Module]] = []
    load = Skeleton.load_block

    def counted(self: Skeleton, index: int) -> nn.Module:
        gc.collect()
        assert not any(ref() is not None for ref in alive), "a prefill module's block outlived its turn"
        block = load(self, index)
        if self.checkpoint.directory != given.base:
            alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Skeleton, "load_block", counted)
    qsun.quantize(given.base, tmp_path / "out", settings(method), given.sources, calibration_prefill=given.prefills)
    assert len(alive) == 2 * 2, "two blocks of two modules"


# --- reproducible and resumable


@pytest.mark.parametrize("method", ["gptq", "awq", "refined"])
def test_stopped_anywhere_and_resumed_gives_the_same_bytes(method, task, tmp_path):
    given, config = task("llama", torch.bfloat16), settings(method)

    def quantize(out: str, **options: Any) -> None:
        prefills = given.prefills
        qsun.quantize(given.base, tmp_path / out, config, given.sources, calibration_prefill=prefills, **options)

    quantize("straight")
    for step in (1, 5, 8, 11, 16):
        with pytest.raises(KeyboardInterrupt):
            quantize(f"stopped{step}", progress=interrupt_at(step))
        quantize(f"stopped{step}", resume=True)
        assert published(tmp_path / f"stopped{step}") == published(tmp_path / "straight"), f"stopped at step {step}"


def test_a_resumed_run_may_not_change_its_prefill_modules(task, cli, tmp_path):
    given, config = task(), settings("gptq")
    prefill = shutil.copytree(given.prefills[0], tmp_path / "P")
    options = {"calibration": given.sources[:2], "calibration_prefill": [prefill, given.prefills[1]]}
    with pytest.raises(KeyboardInterrupt):
        qsun.quantize(given.base, tmp_path / "out", config, progress=interrupt_at(10), **options)
    build_model(prefill, "llama", seed=9)  # other weights at the same place
    with pytest.raises(qsun.ResumeError, match="prefill_modules was"):
        qsun.quantize(given.base, tmp_path / "out", config, resume=True, **options)
    options["calibration_prefill"] = [given.prefills[1], given.prefills[0]]
    with pytest.raises(qsun.ResumeError, match="prefill_modules was"):
        qsun.quantize(given.base, tmp_path / "out", config, resume=True, **options)
    options["calibration_prefill"] = [given.prefills[0], given.base]
    with pytest.raises(qsun.ResumeError, match="calibration was"):
        qsun.quantize(given.base, tmp_path / "out", config, resume=True, **options)
    options["calibration_prefill"] = [given.prefills[0], given.prefills[1]]  # the same weights at another place
    qsun.quantize(given.base, tmp_path / "out", config, resume=True, **options)
