"""The KV cache of a model: its shape and bytes by config, and the name of its argument in transformers."""

import inspect
from typing import Any

import torch
from transformers import LlamaModel

# Name of the cache in the forward of models and blocks: transformers 5.24 renamed it.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Return (layers, KV heads, head_dim)."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    layers, heads, width = kv_shape(config)
    return 2 * layers * heads * width * dtype.itemsize
