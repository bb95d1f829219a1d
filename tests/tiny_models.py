"""Tiny models of every supported family, and data for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 128  # as the packaged demo base, whose tokenizer is lent to the tiny models
SEQUENCE = 24  # longer than the sliding windows below
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": _MIXED_LAYERS,
        "attn_logit_softcapping": 3.0,  # low enough to bend the logits of a tiny model
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 7,
        "layer_types": _MIXED_LAYERS,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "phi3": {},
    "llama4_text": {
        "head_dim": 32,
        "intermediate_size_mlp": 128,
        "moe_layers": [],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "olmo2": {},
}


def build_model(
    directory: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Save a random model of a family; norms and biases are random too, so that none of them can go missing."""
    config = AutoConfig.for_model(family, **({"tie_word_embeddings": False} | SIZES | FAMILIES[family] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.2))
    model.to(dtype).save_pretrained(directory)
    return directory


def reference(directory: Path) -> Any:
    """transformers' own model in float32. Eager attention, as its fused one ignores Gemma 2's soft cap."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def random_tokens(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """(rows, columns) int64 token ids, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, columns))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_rows(count: int) -> list[dict[str, str]]:
    """Prompts and responses of different lengths."""
    return [{"prompt": "abcdefghijkl"[: 3 + i % 7], "response": "zyxwvuts"[: 2 + i % 5]} for i in range(count)]
