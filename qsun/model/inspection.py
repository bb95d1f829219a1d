"""What a model directory is, read from its headers and its manifest."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qsun.config import LayerSpec
from qsun.model.architectures import architecture_of
from qsun.model.checkpoint import Checkpoint, plain_name, read_json, stored_quantization
from qsun.model.locate import find_model
from qsun.model.lora import ADAPTER_CONFIG, adapted_layers, adapter_file, read_settings
from qsun.model.manifest import read_manifest
from qsun.model.quantization_config import engines_for, stored_format
from qsun.model.skeleton import empty_model, read_model_config, weight_shape
from qsun.model.stored_layers import bits_per_weight, layer_spec, quantized_layer_names


def describe(directory: str | Path) -> dict[str, Any]:
    """Return kind, format, bits a weight, layers with their settings and errors, and engines.

    Of a LoRA adapter: kind, its base's name, rank, scale and layers; the base itself need not be there.

    Raises:
        QsunError: not a model directory that qsun reads.
    """
    path = find_model(str(directory))
    if (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists():
        return _adapter(directory, path)
    checkpoint, config = Checkpoint(path), read_model_config(path)
    model = empty_model(config)
    linears = architecture_of(config.model_type).all_linear_names(config.num_hidden_layers)
    stored = stored_quantization(path)
    fmt = stored_format(stored) if stored else "full precision"
    integers = set(quantized_layer_names(checkpoint))
    linears += ["lm_head"] if "lm_head" in integers else []
    shapes = {name: weight_shape(model, name) for name in linears}
    specs = {
        name: _spec(checkpoint, name, fmt, shapes[name][1], stored) if name in integers else LayerSpec(16, -1, True)
        for name in linears
    }
    made = read_manifest(path)
    quantized = bool(made) and made["kind"] == "decode_module"
    errors = {layer["name"]: layer["error"] for layer in made["layers"]} if quantized else {}
    return {
        "directory": str(directory),
        "kind": made["kind"].replace("_", " ") if made else ("quantized model" if stored else "full-precision model"),
        "architecture": config.model_type,
        "format": fmt,
        "bits_per_weight": bits_per_weight(checkpoint, shapes),
        "engines": engines_for(fmt, stored, specs, bool(config.tie_word_embeddings))
        if stored
        else {"qsun": "yes", "transformers": "yes", "vllm": "yes"},
        "manifest": {"method": made["config"]["method"], "base": made["base"], "seed": made["config"]["seed"]}
        if quantized
        else None,
        "layers": [{"name": name} | asdict(spec) | {"error": errors.get(name)} for name, spec in specs.items()],
    }


def _adapter(directory: str | Path, path: Path) -> dict[str, Any]:
    settings, made = read_settings(path), read_manifest(path)
    return {
        "directory": str(directory),
        "kind": "LoRA adapter" if not made else f"{made['kind'].replace('_', ' ')}, LoRA adapter",
        "base": read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path"),
        "rank": settings.rank,
        "scale": settings.scale,
        "layers": [{"name": plain_name(layer)} for layer in adapted_layers(adapter_file(path))],
    }


def _spec(checkpoint: Checkpoint, name: str, fmt: str, in_features: int, stored: dict[str, Any]) -> LayerSpec:
    """Return a layer's settings; formats that always store zero points say in config.json if they are symmetric."""
    spec = layer_spec(checkpoint, name, fmt, in_features)
    if not fmt.startswith("gptq"):
        return spec
    return replace(spec, sym=bool(_own_settings(stored, name).get("sym", stored.get("sym", spec.sym))))


def _own_settings(stored: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of the first pattern under `dynamic` that matches, as gptqmodel reads them."""
    for pattern, settings in (stored.get("dynamic") or {}).items():
        if pattern.startswith("+:") and re.match(pattern.removeprefix("+:"), name):
            return settings
    return {}
