"""Adapters, requests and the reference for prefill-only LoRA in a real vLLM.

The reference is transformers': a model with the adapter merged into it fills a cache, and the model without answers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import qsun
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.quant_linear import QuantLinear
from tests.oracles.bases import VOCAB

NEW_TOKENS = 12
RANK, ALPHA = 8, 16
NAMES = [f"task{i}" for i in range(16)]


@dataclass(frozen=True)
class Asked:
    """A request; n: answers that are asked for."""

    adapter: str | None
    tokens: list[int]
    n: int = 1


def write_adapters(root: Path, base: Path, names: list[str]) -> dict[str, Path]:
    """Adapters of all linear layers in peft's layout, strong enough that answers differ."""
    model = AutoModelForCausalLM.from_pretrained(base)
    linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    for seed, name in enumerate(names):
        random = torch.Generator().manual_seed(seed)
        tensors = {}
        for linear in linears:
            out, inputs = model.model.layers.get_submodule(linear).weight.shape
            at = f"base_model.model.model.layers.{linear}"
            tensors[f"{at}.lora_A.weight"] = 0.1 * torch.randn(RANK, inputs, generator=random)
            tensors[f"{at}.lora_B.weight"] = 0.1 * torch.randn(out, RANK, generator=random)
        (root / name).mkdir(parents=True)
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
    return {name: root / name for name in names}


def dequantized(module: Path, base: Path, out: Path) -> Path:
    """Write a decode module's weights as a plain float32 model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in qsun.load_decode(module, device="cpu", dtype="float32").model.named_modules():
        if isinstance(layer, QuantLinear):
            model.get_submodule(name).weight.data = layer.weight_in(torch.float32)
    model.save_pretrained(out)
    return out


class Reference:
    """Greedy answers over the seam with transformers alone, all weights those of one float32 model.

    dtype: of the computation.
    """

    def __init__(self, model: Path, adapters: dict[str, Path], dtype: torch.dtype = torch.float32):
        self.decode = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(dtype)
        self.prefill = {None: self.decode}
        for name, directory in adapters.items():
            merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
            tensors, weights = load_file(directory / "adapter_model.safetensors"), dict(merged.named_parameters())
            for key in tensors:
                if ".lora_A." in key:
                    change = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                    target = key.removeprefix("base_model.model.").replace(".lora_A", "")
                    weights[target].data += ALPHA / RANK * change
            self.prefill[name] = merged.to(dtype)

    @torch.no_grad()
    def logits(self, asked: Asked, forced: list[int] | None = None) -> np.ndarray:
        """(NEW_TOKENS, vocabulary) before each token of the answer, which is greedy or forced."""
        cache = DynamicCache(config=self.decode.config)
        if len(asked.tokens) > 1:
            prompt = torch.tensor([asked.tokens[:-1]])
            self.prefill[asked.adapter](prompt, **{CACHE_ARGUMENT: cache}, use_cache=True)
        token, rows = asked.tokens[-1], []
        for step in range(NEW_TOKENS):
            row = self.decode(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache}, use_cache=True).logits[0, -1].float()
            rows.append(row.numpy())
            token = int(row.argmax()) if forced is None else forced[step]
        return np.stack(rows)

    def answer(self, asked: Asked) -> list[int]:
        return self.logits(asked).argmax(-1).tolist()


def first_wave(names: list[str], count: int) -> list[Asked]:
    """Requests of 1 to 600 tokens over all adapters and the base; half of them begin with one shared text, and every
    seventh asks for three answers. The lengths end before, at and after the ends of blocks of 32 tokens."""
    random = np.random.default_rng(5)
    shared = random.integers(3, VOCAB, 300).tolist()
    wave = []
    for i in range(count):
        length = int([1, 2, 31, 32, 33, 65, 600, random.integers(3, 400)][i % 8])
        tokens = random.integers(3, VOCAB, length).tolist()
        if i % 2:
            tokens = (shared + tokens)[:length]
        wave.append(Asked([*names, None][i % (len(names) + 1)], tokens, 3 if i % 7 == 3 else 1))
    return wave


def second_wave(wave: list[Asked], answers: list[list[int]]) -> list[Asked]:
    """Each prompt, its answer and a few more tokens, read by the same adapter from the beginning."""
    random = np.random.default_rng(6)
    return [
        Asked(asked.adapter, asked.tokens + answer + random.integers(3, VOCAB, 9).tolist(), asked.n)
        for asked, answer in zip(wave, answers, strict=True)
    ]
