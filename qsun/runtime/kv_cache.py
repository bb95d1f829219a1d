"""The KV cache of a model: its shape and bytes by config, and the name of its argument in transformers."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel

from qsun.model.architectures import kv_shape

# Name of the cache in the forward of models and blocks: transformers 5.24 renamed it.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
KV_DTYPES = ("auto", "fp8")  # of a decode batch's cache; auto: the model's
_LARGEST_FP8, _SMALLEST = 448.0, 1e-12  # e4m3; a head of zeros has a scale, too


def kv_tensors(width: int, dtype: torch.dtype, kv_dtype: str) -> list[tuple[int, torch.dtype]]:
    """Return (last dimension, dtype) of what a layer's cache holds: keys and values, and for "fp8" their scales."""
    if kv_dtype == "auto":
        return [(width, dtype)] * 2
    return [(width, torch.uint8)] * 2 + [(1, torch.float32)] * 2


def kv_bytes_per_token(config: Any, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Return the bytes of one token's keys and values in all layers."""
    layers, heads, width = kv_shape(config)
    return layers * heads * sum(size * each.itemsize for size, each in kv_tensors(width, dtype, kv_dtype))


def encode_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round (..., head_dim) keys or values to float8 e4m3, each head of each token with a scale of its own.

    Returns:
        (..., head_dim) uint8, the bits of e4m3, and (..., 1) float32 scales. NaN and Inf become NaN.
    """
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST) / _LARGEST_FP8
    return (x / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales


def decode_kv(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert `encode_kv`, rounding once."""
    return (q.view(torch.float8_e4m3fn).float() * scales).to(dtype)
