"""Prefill modules: a task's fine-tuned model, of which only the KV cache of a prompt is ever used."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsun.errors import QsunError
from qsun.model.checkpoint import stored_quantization
from qsun.model.locate import find_model
from qsun.model.lora import ADAPTER_CONFIG, adapter_base, merge_adapter, read_adapter
from qsun.model.manifest import read_manifest
from qsun.model.pairing import check_served_pair, on_decode_weights
from qsun.runtime.decode_module import DecodeModule, dequantize_layers, load_decode

log = logging.getLogger(__name__)
PLAIN_ADAPTER = (
    "adapter {0} was not tuned against a frozen decode module: it acts on prompt tokens only, "
    "and the decode module writes the answer without it; what it taught about answers is lost unless you tune it with "
    "qsun tune --init {0}"
)


@dataclass(frozen=True)
class PrefillModule:
    """A task's half of a SUN pair.

    Attributes:
        model: transformers' causal LM, full precision; its last layer's output, final norm and lm_head are never used.
        directory: where it was loaded from.
        manifest: qsun.json, empty for a model that qsun did not make.
    """

    model: Any
    directory: Path
    manifest: dict[str, Any] = field(default_factory=dict)


def load_prefill(
    directory: str | Path,
    decode: DecodeModule | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
) -> PrefillModule:
    """Load a prefill module: a full-precision Hugging Face directory, "demo", or a LoRA adapter of one.

    An adapter is merged into its base in float32 and then rounded: prefill then runs at the plain model's speed, and
    what it writes is one model's KV, at the price of one set of weights for each task. One that was tuned on the decode
    module's own weights is merged into those, dequantized. Logs a warning for an ordinary adapter, which was
    not tuned against a frozen decode module.

    Args:
        decode: the module that it will be paired with; the pair is checked, and its device is the default. Logs a
            warning where calibration of a decode module of few bits did not cover this prefill module.
        dtype: default: what the directory (for an adapter, its base) is stored in.
        device: default: decode's, or else a GPU if available.
    Raises:
        QsunError: a damaged or quantized directory, or one that does not fit the decode module.
    """
    path = find_model(str(directory))
    if decode is not None:
        check_served_pair(path, decode.directory)
        device = device or decode.model.model.embed_tokens.weight.device
    if (path / ADAPTER_CONFIG).exists():
        manifest = read_manifest(path)
        if not manifest or (
            decode is not None and manifest.get("kind") == "fine_tune"
        ):  # alone, that is what it is for
            log.warning("%s", PLAIN_ADAPTER.format(path))
        weights = decode.directory if decode is not None and on_decode_weights(path) else adapter_base(path)
        return PrefillModule(load_with_adapter(weights, path, device, dtype), path, manifest)
    if stored_quantization(path):
        raise QsunError(f"{path} is quantized; a prefill module is full precision: give its base or a tuned module")
    loaded = load_decode(path, device, dtype)
    return PrefillModule(loaded.model, path, loaded.manifest)


def load_with_adapter(
    directory: Path, adapter: Path, device: str | torch.device | None, dtype: torch.dtype | str | None
) -> nn.Module:
    """Load the weights that an adapter was tuned on, full precision or quantized, and merge it into them."""
    model = load_decode(directory, device, dtype, keep_dense=False, merge=False, fuse=False).model
    read_adapter(model, adapter)
    merge_adapter(model)
    dequantize_layers(model)
    return model
