"""Adapters on prompt tokens only in a real vLLM engine, float32, token by token.

The reference is transformers': the base with an adapter merged into it fills a cache, and the base answers from it.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

from qsun.runtime.kv_cache import CACHE_ARGUMENT
from tests.oracles.bases import VOCAB, make_base
from tests.oracles.conftest import Probe

pytestmark = pytest.mark.oracle

NEW_TOKENS = 12
RANK, ALPHA = 8, 16
NAMES = [f"task{i}" for i in range(16)]
ENGINE = {
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("lora") / "base", torch.float32)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Sixteen adapters in peft's layout, strong enough that answers differ."""
    root, model = tmp_path_factory.mktemp("adapters"), AutoModelForCausalLM.from_pretrained(base)
    linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    for seed, name in enumerate(NAMES):
        random = torch.Generator().manual_seed(seed)
        tensors = {}
        for linear in linears:
            out, inputs = model.model.layers.get_submodule(linear).weight.shape
            at = f"base_model.model.model.layers.{linear}"
            tensors[f"{at}.lora_A.weight"] = 0.1 * torch.randn(RANK, inputs, generator=random)
            tensors[f"{at}.lora_B.weight"] = 0.1 * torch.randn(out, RANK, generator=random)
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors", {"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": RANK,
            "lora_alpha": ALPHA,
            "bias": "none",
            "target_modules": sorted({linear.split(".")[-1] for linear in linears}),
        }
        (root / name / "adapter_config.json").write_text(json.dumps(settings))
    return {name: root / name for name in NAMES}


class Reference:
    """Greedy answers over the seam with transformers alone."""

    def __init__(self, base, adapters):
        from safetensors.torch import load_file

        self.decode = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.prefill = {None: self.decode}
        for name, directory in adapters.items():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            tensors, weights = load_file(directory / "adapter_model.safetensors"), dict(model.named_parameters())
            for key in tensors:
                if ".lora_A." in key:
                    change = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                    target = key.removeprefix("base_model.model.").replace(".lora_A", "")
                    weights[target].data += ALPHA / RANK * change
            self.prefill[name] = model

    @torch.no_grad()
    def answer(self, adapter, tokens):
        cache = DynamicCache(config=self.decode.config)
        if len(tokens) > 1:
            self.prefill[adapter](torch.tensor([tokens[:-1]]), **{CACHE_ARGUMENT: cache}, use_cache=True)
        token, answer = tokens[-1], []
        for _ in range(NEW_TOKENS):
            logits = self.decode(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache}, use_cache=True).logits
            token = int(logits[0, -1].argmax())
            answer.append(token)
        return answer


@pytest.fixture(scope="module")
def reference(base, adapters):
    torch.set_num_threads(2)
    yield Reference(base, adapters)
    torch.set_num_threads(1)


def first_wave():
    """64 requests, of 1 to 600 tokens, over 16 adapters and the base; half of them begin with one shared text."""
    random = np.random.default_rng(5)
    shared = random.integers(3, VOCAB, 300).tolist()
    wave = []
    for i in range(64):
        length = int([1, 2, 31, 32, 33, 65, 600, random.integers(3, 400)][i % 8])
        tokens = random.integers(3, VOCAB, length).tolist()
        if i % 2:
            tokens = (shared + tokens)[:length]
        wave.append({"adapter": [*NAMES, None][i % 17], "tokens": tokens})
    return wave


def with_answers(wave, answers):
    """A second turn: each prompt, its answer and a few more tokens, read by the same adapter from the beginning."""
    random = np.random.default_rng(6)
    return [
        {"adapter": request["adapter"], "tokens": request["tokens"] + answer + random.integers(3, VOCAB, 9).tolist()}
        for request, answer in zip(wave, answers, strict=True)
    ]


def test_answers_are_those_of_merged_prefill_modules(base, adapters, reference, probe: Probe, tmp_path, monkeypatch):
    monkeypatch.setenv("QSUN_PREFILL_LORA", "1")
    first = first_wave()
    expected = [reference.answer(request["adapter"], request["tokens"]) for request in first]
    second = with_answers(first, expected)
    expected += [reference.answer(request["adapter"], request["tokens"]) for request in second]
    job = {
        "model": str(base),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "waves": [first, second],
        "new_tokens": NEW_TOKENS,
        "engine": ENGINE,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    *tokens, preemptions, hits = probe("vllm", "vllm_prefill_lora.py", tmp_path / "job.json").tolist()
    answers = np.array(tokens).reshape(-1, NEW_TOKENS).tolist()
    wrong = [i for i, (ours, theirs) in enumerate(zip(answers, expected, strict=True)) if ours != theirs]
    assert (wrong, preemptions > 0, hits > 0) == ([], True, True)
