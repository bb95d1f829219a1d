"""Adapters on prompt tokens only in a real vLLM engine, token by token.

Every engine has prefix caching and chunked prefill on, and a KV cache so small that requests are preempted.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracles.bases import make_base
from tests.oracles.compare import disagreements, record
from tests.oracles.conftest import Build, Probe
from tests.oracles.prefill_lora import (
    NAMES,
    NEW_TOKENS,
    RANK,
    Reference,
    dequantized,
    first_wave,
    second_wave,
    write_adapters,
)
from tests.places import ROOT

pytestmark = pytest.mark.oracle

ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_loras": 6,
    "max_cpu_loras": 16,
    "max_lora_rank": RANK,
    "block_size": 32,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 256,  # prompts are read in chunks
    "kv_cache_memory_bytes": 8 << 20,  # for about 2,000 tokens, so that requests are preempted
}
FEW = NAMES[:6]


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def ask(probe: Probe, root, model, adapters, waves, script="vllm_prefill_lora.py", **engine):
    """(answers of each request, preemptions, prefix-cache hits)"""
    job = {
        "model": str(model),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "waves": [[asdict(asked) for asked in wave] for wave in waves],
        "new_tokens": NEW_TOKENS,
        "engine": ENGINE | engine,
    }
    (root / "job.json").write_text(json.dumps(job))
    *tokens, preemptions, hits = probe("vllm", script, root / "job.json").tolist()
    found, rest = [], np.array(tokens).reshape(-1, NEW_TOKENS).tolist()
    for asked in (asked for wave in waves for asked in wave):
        found.append(rest[: asked.n])
        rest = rest[asked.n :]
    assert rest == []
    return found, preemptions, hits


def check_exact(probe: Probe, root, model, adapters, reference, count, **engine):
    """Two turns of so many conversations, every token that of merged prefill modules."""
    first = first_wave([*adapters], count)
    expected = [reference.answer(asked) for asked in first]
    second = second_wave(first, expected)
    expected += [reference.answer(asked) for asked in second]
    found, preemptions, hits = ask(probe, root, model, adapters, [first, second], **engine)
    wrong = [i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != [theirs] * len(ours)]
    record("vllm prefill-only LoRA", requests=len(found), wrong=len(wrong), preemptions=preemptions, hits=hits)
    assert (wrong, preemptions > 0, hits > 0) == ([], True, True)


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setenv("QSUN_PREFILL_LORA", "1")


@pytest.fixture(scope="module")
def quantized(build: Build, tmp_path_factory):
    """A 4-bit module, its weights as a float32 model, and adapters of it."""
    module = build("fp32", group_size=32)
    root = tmp_path_factory.mktemp("quantized")
    base = make_base(root / "base", torch.float32)
    dense = dequantized(module, base, root / "dense")
    return module, dense, write_adapters(root / "adapters", base, FEW)


def test_64_conversations_over_16_adapters(probe: Probe, tmp_path, switched_on):
    base = make_base(tmp_path / "base", torch.float32)
    adapters = write_adapters(tmp_path / "adapters", base, NAMES)
    check_exact(probe, tmp_path, base, adapters, Reference(base, adapters), 64)


def test_int4_on_our_kernels(quantized, probe: Probe, tmp_path, switched_on):
    module, dense, adapters = quantized
    check_exact(probe, tmp_path, module, adapters, Reference(dense, adapters), 24, quantization="qsun")


def test_int4_on_two_tensor_parallel_ranks(quantized, probe: Probe, tmp_path, switched_on):
    module, dense, adapters = quantized
    engine = {"quantization": "qsun", "tensor_parallel_size": 2, "kv_cache_memory_bytes": 4 << 20}
    check_exact(probe, tmp_path, module, adapters, Reference(dense, adapters), 24, **engine)


def test_int4_on_vllms_own_kernels(quantized, probe: Probe, tmp_path, switched_on):
    """They compute in bfloat16 on a CPU, so tokens are compared where the reference's choice is clear."""
    module, dense, adapters = quantized
    reference = Reference(dense, adapters, torch.bfloat16)
    wave = [asked for asked in first_wave([*adapters], 24) if asked.n == 1]
    found, preemptions, hits = ask(
        probe, tmp_path, module, adapters, [wave], dtype="bfloat16", kv_cache_memory_bytes=4 << 20
    )
    pairs = [(answer[0], reference.logits(asked, answer[0])) for asked, answer in zip(wave, found, strict=True)]
    wrong, clear = disagreements(np.array([answer for answer, _ in pairs]), np.stack([logits for _, logits in pairs]))
    record("vllm prefill-only LoRA, its kernels", clear=clear, wrong=wrong, preemptions=preemptions, hits=hits)
    assert clear > 100
    assert wrong == 0


def test_the_second_model_runner(probe: Probe, tmp_path, switched_on, monkeypatch):
    """vLLM's environment has no Triton, so it borrows ours, interpreted: slow, hence short prompts and no sampling."""
    triton = pytest.importorskip("triton")
    (tmp_path / "lent").mkdir()
    (tmp_path / "lent" / "triton").symlink_to(Path(triton.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path / 'lent'}")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    base = make_base(tmp_path / "base", torch.float32)
    adapters = write_adapters(tmp_path / "adapters", base, NAMES[:3])
    reference = Reference(base, adapters)
    first = [replace(asked, n=1) for asked in first_wave([*adapters], 16) if len(asked.tokens) < 100]
    expected = [reference.answer(asked) for asked in first]
    second = second_wave(first, expected)
    expected += [reference.answer(asked) for asked in second]
    engine = {"max_model_len": 512, "max_num_seqs": 8, "max_loras": 3, "max_num_batched_tokens": 64}
    engine |= {"kv_cache_memory_bytes": 4 << 20}
    script = "vllm_second_runner.py"
    found, _, hits = ask(probe, tmp_path, base, adapters, [first, second], script, **engine)
    assert (found, hits > 0) == ([[answer] for answer in expected], True)


def test_a_vllm_whose_internals_moved_is_refused_at_start(probe: Probe, tmp_path, switched_on):
    base = make_base(tmp_path / "base", torch.float32)
    refused = probe("vllm", "vllm_moved.py", base)
    assert len(refused) > 15
    assert refused.all()
