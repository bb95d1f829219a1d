"""quantization_config, and which engines load what."""

import re

import pytest

from qsun.config import QuantConfig
from qsun.errors import QsunError
from qsun.model.architectures import ARCHITECTURES
from qsun.model.quantization_config import (
    check_fused,
    check_overrides,
    engines_for,
    make_quantization_config,
    stored_format,
)

NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in ARCHITECTURES["llama"].linear_names()]


def specs_of(config):
    return {name: config.spec_for(name) for name in NAMES}


@pytest.mark.parametrize("fmt", ["gptq", "awq", "compressed-tensors"])
def test_what_is_written_is_read(fmt):
    config = QuantConfig(format=fmt)
    assert stored_format(make_quantization_config(config, specs_of(config))) == fmt


@pytest.mark.parametrize(
    "values",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "gptq", "format": "marlin"},
        {},
    ],
)
def test_other_formats_are_refused(values):
    with pytest.raises(QsunError, match="is not supported; use gptq, awq or compressed-tensors"):
        stored_format(values)


def test_transforms_at_run_time_are_refused():
    """Those that are folded into the weights may be listed too."""
    config = QuantConfig(format="compressed-tensors")
    values = make_quantization_config(config, specs_of(config))
    assert stored_format(values | {"transform_config": {}}) == "compressed-tensors"
    for location, fits in (("weight_input", True), ("weight_output", True), ("input", False)):
        group = {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": location}]}
        rotated = values | {"transform_config": {"config_groups": {"R4": group}}}
        if fits:
            assert stored_format(rotated) == "compressed-tensors"
        else:
            with pytest.raises(QsunError, match=r"transform R4 of input \(transform_config\) acts at run time"):
                stored_format(rotated)


def test_dynamic_matches_just_the_overridden_layers_and_what_vllm_fuses_them_into():
    config = QuantConfig(overrides=(r"1\.self_attn\.[qkv]_proj=bits:8", "0.mlp.down_proj=skip"))
    dynamic = make_quantization_config(config, specs_of(config))["dynamic"]
    (eight,) = (key for key, value in dynamic.items() if value)
    (skip,) = (key for key, value in dynamic.items() if not value)
    assert dynamic[eight] == {"bits": 8, "group_size": 128, "sym": True}
    pattern = re.compile(eight.removeprefix("+:"))
    assert [n for n in NAMES if pattern.match(n)] == [n for n in NAMES if "1.self_attn" in n and "o_proj" not in n]
    assert pattern.match("model.layers.1.self_attn.qkv_proj")
    assert skip.startswith("-:")
    assert re.match(skip[2:], "model.layers.0.mlp.down_proj")
    assert not re.match(skip[2:], "model.layers.0.mlp.down_proj_two")


def test_compressed_tensors_groups_cover_each_layer_once():
    config = QuantConfig(format="compressed-tensors", overrides=("down_proj=bits:8", "0.self_attn.o=skip"))
    values = make_quantization_config(config, specs_of(config))
    targets = [t for group in values["config_groups"].values() for t in group["targets"]]
    for name in NAMES:
        hits = sum(bool(re.match(t.removeprefix("re:"), name)) for t in targets)
        assert hits == (0 if name.endswith("0.self_attn.o_proj") else 1)
    assert values["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]


def test_overrides_must_match_and_must_not_split_fused_layers():
    config = QuantConfig(overrides=("dwon_proj=bits:8",))
    with pytest.raises(QsunError, match="'dwon_proj' matches no layer"):
        check_overrides(config, specs_of(config))
    for pattern in ("q_proj", "up_proj"):
        with pytest.raises(QsunError, match="vLLM fuses"):
            check_fused(specs_of(QuantConfig(overrides=(f"{pattern}=bits:8",))))
    check_fused(specs_of(QuantConfig(overrides=("[qkv]_proj=bits:8", "(gate|up)_proj=skip"))))


@pytest.mark.parametrize(
    ("settings", "engine", "yes"),
    [
        ({}, "vllm", True),
        ({}, "auto-gptq", True),
        ({"bits": 3}, "vllm", False),
        ({"sym": False}, "vllm", False),
        ({"desc_act": True}, "vllm", False),
        ({"format": "awq", "sym": False}, "vllm", True),
        ({"overrides": ("down_proj=bits:8",)}, "auto-gptq", False),
        ({"overrides": ("down_proj=bits:8",)}, "vllm", False),
        ({"overrides": ("down_proj=group_size:32",)}, "vllm", True),
        ({"bits": 8}, "vllm", False),
        ({"format": "awq", "group_size": -1}, "vllm", True),
        ({"group_size": -1}, "transformers (gptqmodel)", False),
        ({"format": "compressed-tensors", "bits": 3}, "vllm", False),
    ],
)
def test_engines(settings, engine, yes):
    config = QuantConfig(**settings)
    answers = engines_for(config.format, make_quantization_config(config, specs_of(config)), specs_of(config))
    assert (answers[engine] == "yes") is yes
    assert answers["qsun"] == "yes"


def test_a_quantized_or_tied_head():
    config = QuantConfig(lm_head=True)
    specs = specs_of(config) | {"lm_head": config.spec_for("lm_head")}
    answers = engines_for("gptq", make_quantization_config(config, specs), specs)
    assert answers["vllm"] == "yes"
    assert "lm_head" in answers["auto-gptq"]
    assert "lm_head" in engines_for("compressed-tensors", {}, specs)["vllm"]
    assert "tied" in engines_for("gptq", {}, specs_of(QuantConfig()), tied=True)["auto-gptq"]
