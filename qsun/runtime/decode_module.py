"""Decode modules: a directory on disk becomes a transformers model whose linear layers are QuantLinear."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from qsun.device import default_device, named_dtype
from qsun.memory import available_bytes
from qsun.model.checkpoint import Checkpoint, stored_quantization
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.manifest import read_manifest
from qsun.model.quantization_config import stored_format
from qsun.model.skeleton import EMBEDDING, HEAD, empty_model, linear_of, plain_linear, read_model_config
from qsun.model.stored_layers import check_weights, read_quantized_layer
from qsun.runtime.fused_block import fuse_blocks
from qsun.runtime.fused_projections import merge_projections
from qsun.runtime.quant_linear import QuantLinear
from qsun.runtime.rotary import use_row_rotary


@dataclass(frozen=True)
class DecodeModule:
    """The shared decoder.

    Attributes:
        model: transformers' causal LM; call it as any other. Its type is one of many, which name their parts alike.
        directory: where it was loaded from.
        manifest: qsun.json, empty for a module that qsun did not make.
    """

    model: Any
    directory: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer of the directory, or None where it has none."""
        return load_tokenizer(self.directory)

    @property
    def eos_tokens(self) -> set[int]:
        """Tokens that end an answer: the model's, and the tokenizer's, with which tuning ends responses."""
        own = self.model.generation_config.eos_token_id
        own = self.model.config.eos_token_id if own is None else own
        taught = None if self.tokenizer is None else self.tokenizer.eos_token_id
        return {*(own if isinstance(own, (list, tuple)) else [own]), taught} - {None}


def load_decode(
    directory: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    keep_dense: bool | None = None,
    merge: bool | None = None,
    fuse: bool | None = None,
) -> DecodeModule:
    """Load a decode module: GPTQ v1 or v2, AWQ gemm, compressed-tensors, or a plain full-precision base.

    Args:
        directory: a Hugging Face directory, or "demo" for the packaged base.
        device: default: a GPU if available.
        dtype: of activations and unquantized weights; default: that of the stored embedding.
        keep_dense: whether layers may keep dequantized copies for the inputs that are faster with them
            (batches beyond 8 rows on most servers, float32); default: where all copies take less than half of the
            free memory.
        merge: one product for q, k and v and one for gate and up (fused_projections.py); default: on a GPU.
        fuse: a merged block's decode step in a few kernels where it can (fused_block.py); default: on a GPU.
    Raises:
        QsunError: a damaged or unsupported directory, or an unknown device or dtype.
    """
    wanted = named_dtype(dtype) if isinstance(dtype, str) else dtype
    device = default_device(device)
    path = find_model(str(directory))
    checkpoint = Checkpoint(path)
    config = read_model_config(path)
    dtype = wanted or checkpoint.dtype(EMBEDDING) or torch.float32
    model = empty_model(config)
    if keep_dense is None:
        keep_dense = sum(p.numel() for p in model.parameters()) * dtype.itemsize < available_bytes(device) / 2
    place_weights(model, checkpoint, dtype, device, keep_dense)
    if merge or (merge is None and device.type == "cuda"):
        merge_projections(model, config)
    if fuse or (fuse is None and device.type == "cuda"):
        fuse_blocks(model, config)
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return DecodeModule(model.to(device).eval().requires_grad_(False), path, read_manifest(path))


def dequantize_layers(model: nn.Module) -> None:
    """Replace quantized layers by plain ones that compute in the same dtype, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, plain_linear(layer.weight_in(layer.dtype), layer.bias))


def place_weights(
    model: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    keep_dense: bool = False,
    prefixes: tuple[str, ...] = ("",),
) -> None:
    """Fill an empty model, or what is under these prefixes of it; layers stored as integers become QuantLinear.

    Raises:
        QsunError: a tensor that is missing or of another shape, or that the model has no place for.
    """
    use_row_rotary(model)
    stored = stored_quantization(checkpoint.directory)
    fmt = stored_format(stored) if stored else ""
    layers, rest = check_weights(checkpoint, model, fmt, prefixes)
    for name in layers:
        _place_quantized(model, checkpoint, name, fmt, dtype, device, keep_dense)
    biases = {f"{name}.bias" for name in layers}
    _place_rest(model, checkpoint.load(name for name in rest if name not in biases), dtype, device)


def _place_quantized(
    model: nn.Module,
    checkpoint: Checkpoint,
    name: str,
    fmt: str,
    dtype: torch.dtype,
    device: torch.device,
    keep_dense: bool,
) -> None:
    """Put a QuantLinear layer in place."""
    linear = linear_of(model, name)
    weights, spec = read_quantized_layer(checkpoint, name, fmt, linear.in_features, device)
    bias = None
    if linear.bias is not None:
        bias = checkpoint.load([f"{name}.bias"])[f"{name}.bias"].to(device, dtype)
    model.set_submodule(name, QuantLinear(weights, bias, spec.bits, dtype, keep_dense))


def _place_rest(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    cast = {name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in tensors.items()}
    tied = bool(model.config.tie_word_embeddings) and EMBEDDING in cast
    if tied:
        cast[HEAD] = cast[EMBEDDING]
    model.load_state_dict(cast, strict=False, assign=True)
    if tied:
        model.tie_weights()
