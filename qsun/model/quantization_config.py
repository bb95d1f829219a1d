"""The quantization_config that each loader reads, written and read; and which engines load a module.

Facts about engines are those verified by `make oracles` (docs/formats.md says which versions).
"""

import re
from collections.abc import Mapping
from typing import Any

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError

# vLLM runs these as one matrix, so their grids must agree.
_FUSED = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj"))


def make_quantization_config(config: QuantConfig, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """Return config.json's quantization_config for layers by full name."""
    build = {"gptq": _gptq_config, "awq": _awq_config, "compressed-tensors": _compressed_config}
    return build[config.format](config, specs)


def stored_format(values: Mapping[str, Any]) -> str:
    """Return the layout (formats.unpack_layer) that a quantization_config means. Raises QsunError for others."""
    method = values.get("quant_method")
    if method == "gptq":
        layout = str(values.get("checkpoint_format") or values.get("format") or "gptq")
        if layout in ("gptq", "gptq_v2"):
            return layout
    if method == "awq" and values.get("version", "gemm") == "gemm":
        return "awq"
    if method == "compressed-tensors" and values.get("format") == "pack-quantized":
        _check_transforms(values.get("transform_config") or {})
        return "compressed-tensors"
    kind = values.get("checkpoint_format") or values.get("format") or values.get("version")
    shown = f"{method!r} ({kind})" if kind else repr(method)
    raise QsunError(f"quantization {shown} is not supported; use gptq, awq or compressed-tensors")


def _check_transforms(values: Mapping[str, Any]) -> None:
    """Raise QsunError for rotations of activations; those folded into the weights are listed too, and do not matter."""
    for name, group in (values.get("config_groups") or {}).items():
        for place in group.get("apply", ()):
            if place.get("location") not in ("weight_input", "weight_output"):
                raise QsunError(
                    f"transform {name} of {place.get('location')} (transform_config) acts at run time, which is not "
                    "supported; quantize with transforms that are folded into the weights, or with none"
                )


def check_fused(specs: Mapping[str, LayerSpec]) -> None:
    """Refuse overrides that split layers which vLLM fuses."""
    for name, spec in specs.items():
        stem, _, last = name.rpartition(".")
        for family in _FUSED:
            for other in family if last in family else ():
                if specs.get(f"{stem}.{other}", spec) != spec:
                    raise QsunError(
                        f"overrides give {name} and {stem}.{other} different settings, but vLLM fuses them; "
                        f"match all of {', '.join(family[:-1])}"
                    )


def check_overrides(config: QuantConfig, layers: Mapping[str, Any]) -> None:
    """Raise QsunError for an override that matches no layer, such as a misspelled one."""
    for override in config.overrides:
        if not any(map(override.matches, layers)):
            example = next(iter(layers))
            raise QsunError(f"override pattern {override.pattern!r} matches no layer; a layer is called {example}")


def engines_for(
    fmt: str, quantization: Mapping[str, Any], specs: Mapping[str, LayerSpec], tied: bool = False
) -> dict[str, str]:
    """Return "yes" or why not for each engine. `tied`: the output projection is the embedding, stored once."""
    quantized = [spec for spec in specs.values() if spec.quantized]
    bits = {spec.bits for spec in quantized}
    answers = {"qsun": "yes"}
    if fmt == "compressed-tensors":
        asym = not all(spec.sym for spec in quantized)
        answers["transformers (compressed-tensors)"] = "5.17 yes, 5.23 no: asymmetric" if asym else "yes"
    else:
        answers |= _python_loaders(fmt, specs, quantized, tied)
    on_cpu = "yes" if bits <= {4} else "GPU only: its CPU kernels are 4-bit"
    refusals = _vllm_refusals(fmt, quantization, specs, quantized)
    return answers | {"vllm": next((reason for wrong, reason in refusals if wrong), on_cpu)}


def _python_loaders(fmt: str, specs: Mapping[str, LayerSpec], quantized: list[LayerSpec], tied: bool) -> dict[str, str]:
    """Answer for transformers with gptqmodel, and for gptq also auto-gptq."""
    rows = any(spec.group_size == -1 and spec.bits == 4 for spec in quantized)
    own = "GPU only, untested: its CPU kernel needs groups" if rows else "yes"
    if fmt == "awq":
        return {"transformers (gptqmodel)": own}
    head = "lm_head" in specs and specs["lm_head"].quantized
    skips = len(quantized) < len(specs)
    per_layer = "no: per-layer settings" if len(set(quantized)) > 1 or skips else None
    common = per_layer or ("no: it ignores a quantized lm_head" if head else None)
    untied = "no: it leaves the head of tied embeddings uninitialized" if tied else "yes"
    return {"transformers (gptqmodel)": common or own, "auto-gptq": common or untied}


def _vllm_refusals(
    fmt: str, quantization: Mapping[str, Any], specs: Mapping[str, LayerSpec], quantized: list[LayerSpec]
) -> list[tuple[bool, str]]:
    bits = {spec.bits for spec in quantized}
    if fmt == "gptq":
        grouped = any(spec.group_size != -1 for spec in quantized)
        return [
            (not bits <= {4, 8}, "no: gptq there is 4 or 8 bits; use compressed-tensors"),
            (not all(spec.sym for spec in quantized), "no: gptq there is symmetric; use awq or compressed-tensors"),
            (bool(quantization.get("desc_act")) and grouped, "no: desc_act there needs group_size -1"),
        ]
    if fmt == "awq":
        return []
    head = "lm_head" in specs and specs["lm_head"].quantized
    return [
        (head, "no: lm_head cannot be compressed there; use gptq"),
        (not bits <= {4, 8}, "CPU no; GPU depends on its kernels for 2 and 3 bits"),
    ]


def _gptq_config(config: QuantConfig, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    values = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "static_groups": config.static_groups and not config.desc_act,
        "damp_percent": config.damp_percent,
        "true_sequential": True,
        "lm_head": config.lm_head,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    dynamic: dict[str, dict[str, Any]] = {}
    usual = LayerSpec(config.bits, config.group_size, config.sym)
    for spec, names in _by_spec(specs).items():
        if spec != usual:
            settings = {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym} if spec.quantized else {}
            dynamic[("+:" if spec.quantized else "-:") + _exactly(names)] = settings
    return values | ({"dynamic": dynamic} if dynamic else {})


def _awq_config(config: QuantConfig, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    skipped = [name for name, spec in specs.items() if not spec.quantized]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": config.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *skipped],
    }


def _compressed_config(config: QuantConfig, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    by_spec = {spec: names for spec, names in _by_spec(specs).items() if spec.quantized}
    groups = {}
    for number, (spec, names) in enumerate(by_spec.items()):
        targets = ["Linear"] if len(by_spec) == 1 else ["re:" + _exactly(names)]
        weights = {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.sym,
            "strategy": "channel" if spec.group_size == -1 else "group",
            "group_size": None if spec.group_size == -1 else spec.group_size,
            "dynamic": False,
            "actorder": None,
        }
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    skipped = [name for name, spec in specs.items() if not spec.quantized]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": skipped if config.lm_head else ["lm_head", *skipped],
        "kv_cache_scheme": None,
    }


def _by_spec(specs: Mapping[str, LayerSpec]) -> dict[LayerSpec, list[str]]:
    found: dict[LayerSpec, list[str]] = {}
    for name, spec in specs.items():
        found.setdefault(spec, []).append(name)
    return found


def _exactly(names: list[str]) -> str:
    """Return a regular expression for exactly these layers, and for the fused ones that vLLM makes of them."""
    fused = {family[-1]: family for family in _FUSED}
    every = dict.fromkeys(names)
    for name in names:
        stem, _, last = name.rpartition(".")
        every |= {f"{stem}.{new}": None for new, family in fused.items() if last in family}
    return "^(" + "|".join(re.escape(name) for name in every) + ")$"
