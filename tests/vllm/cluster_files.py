"""Modules and cluster file of the real vLLM test: two prefill modules of one tiny base, and its int4 decode module."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import qsun
from qsun.demo import base_directory

VOCAB = 128  # of the demo base, whose tokenizer is lent
MODELS = ("math", "code")
MAX_TOKENS = 512
_CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}


def make_modules(root: Path, names: tuple[str, ...] = MODELS) -> dict[str, Path]:
    """Directories by name: base, decode, and prefill modules. Greedy choices are clear: the head is scaled up."""
    torch.manual_seed(5)
    base = LlamaForCausalLM(LlamaConfig(**_CONFIG))
    base.lm_head.weight.data.mul_(4)
    made = {"base": _save(base, root / "base")}
    for name in names:
        tuned = LlamaForCausalLM(LlamaConfig(**_CONFIG))
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tuned.model.layers.parameters():
                if parameter.ndim == 2:
                    parameter.add_(torch.randn_like(parameter) * 0.03)
        made[name] = _save(tuned, root / name)
    tokens = np.random.default_rng(1).integers(3, VOCAB, (8, 64))
    np.save(root / "calibration.npy", tokens)
    config = qsun.QuantConfig(method="gptq", bits=4, group_size=32, samples=8, seq_len=64, sweeps=1)
    qsun.quantize(made["base"], root / "decode", config, root / "calibration.npy", "cpu")
    return made | {"decode": root / "decode"}


def _save(model: LlamaForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in base_directory().glob(pattern):
            shutil.copyfile(file, directory / file.name)
    return directory


def write_cluster(root: Path, python: Path, **changes: Any) -> Path:
    """cluster.yaml for `qsun up` with these values, some of them changed."""
    path = root / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster_values(python) | changes))
    return path


def cluster_values(python: Path) -> dict[str, Any]:
    """Values of cluster.yaml: one prefill worker a model, two decode workers, all in float32 on the CPU."""
    return {
        "listen": {"port": 0},
        "decode": {"module": "decode", "workers": 2},
        "models": {name: {"module": name, "workers": 1} for name in MODELS},
        "limits": {
            "deadline_seconds": 600.0,
            "stall_seconds": 300.0,
            "prefill_seconds": 300.0,
            "no_worker_seconds": 60.0,
        },
        "health": {"timeout_seconds": 60.0},  # cores are few, and other work may take most of them
        "launch": {
            "python": str(python),
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": MAX_TOKENS,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 1 << 26,
        },
    }
