"""Settings: validated once, the same from Python, YAML and the command line, with errors of one line."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from qsun.config import LayerSpec, Override, QuantConfig, Section, Settings, read_config_file
from qsun.errors import QsunError


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 5}, "bits 5 is not supported; use 2, 3, 4 or 8"),
        ({"bits": "4"}, "bits '4' is not supported"),
        ({"bits": True}, "bits True is not supported"),
        ({"group_size": 96}, "group_size 96 is not supported; use -1, 32, 64 or 128"),
        ({"method": "magic"}, "method 'magic' is not supported; use rtn, gptq, awq, awq+gptq or refined"),
        ({"method": None}, "method None is not supported"),
        ({"format": "gguf"}, "format 'gguf' is not supported; use gptq, awq or compressed-tensors"),
        ({"sym": 1}, "sym 1 is neither true nor false"),
        ({"samples": 0}, "samples 0 is out of range; use 1 or more"),
        ({"samples": 2**21}, "samples 2097152 is out of range; use 1048576 or less"),
        ({"seq_len": 1}, "seq_len 1 is out of range; use 2 or more"),
        ({"seed": -1}, "seed -1 is out of range; use 0 or more"),
        ({"seed": 2**32}, "seed 4294967296 is out of range; use less than 4294967296"),
        ({"seed": 0.5}, "seed 0.5 is not a whole number"),
        ({"damp_percent": 0.0}, "damp_percent 0.0 is out of range; use 1e-06 or more"),
        ({"damp_percent": float("nan")}, "damp_percent nan is out of range"),
        ({"damp_percent": "much"}, "damp_percent 'much' is not a number"),
        ({"shrinkage": -0.1}, "shrinkage -0.1 is out of range; use 0.0 or more"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; use auto, float32, bfloat16 or float16"),
        ({"overrides": "down_proj=bits:8"}, "is not a list of strings such as 'down_proj=bits:8'"),
        ({"desc_act": True, "method": "awq"}, "desc_act has no meaning for method awq; use gptq,"),
        ({"bit": 4}, "unknown setting 'bit'; did you mean bits? known are: bits, damp_percent,"),
        ({"colour": 4}, "unknown setting 'colour'; known are: bits, damp_percent,"),
    ],
)
def test_bad_values_name_themselves_and_the_limit(settings, says):
    for build in (lambda: QuantConfig(**settings), lambda: QuantConfig.from_dict(settings)):
        with pytest.raises(QsunError) as caught:
            build()
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_choices_are_found_however_they_are_spelled():
    config = QuantConfig(method="AWQ+GPTQ", format="compressed_tensors")
    assert (config.method, config.format) == ("awq+gptq", "compressed-tensors")
    assert QuantConfig("GPTQ", 3) == QuantConfig(method="gptq", bits=3)


def test_round_trip():
    config = QuantConfig(bits=3, sym=False, overrides=("down_proj=bits:8,group_size:32", "layers.0=skip"))
    assert config.to_dict()["overrides"] == ["down_proj=bits:8,group_size:32", "layers.0=bits:16"]
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_settings_are_frozen_and_copies_are_checked():
    config = QuantConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.bits = 3
    assert config.replace(bits=3) == QuantConfig(bits=3)
    with pytest.raises(QsunError, match="bits 5"):
        config.replace(bits=5)


def test_overrides_apply_in_order():
    config = QuantConfig(overrides=("mlp=bits:8", "down_proj=bits:4,sym:false", r"layers\.0\.=skip"))
    assert config.spec_for("model.layers.1.mlp.up_proj") == LayerSpec(8, 128, True)
    assert config.spec_for("model.layers.1.mlp.down_proj") == LayerSpec(4, 128, False)
    assert config.spec_for("model.layers.1.self_attn.q_proj") == LayerSpec(4, 128, True)
    assert not config.spec_for("model.layers.0.mlp.up_proj").quantized


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.1", {1}),
        (r"layers\.1\.mlp", {1}),
        ("1.mlp", {1}),
        (r"layers\.1\d", {10, 11}),
        (r"layers\.\d+", {1, 2, 10, 11, 21}),
        ("(?i)LAYERS.(1|2)", {1, 2}),
        ("mlp", {1, 2, 10, 11, 21}),
    ],
)
def test_a_number_in_a_pattern_is_a_whole_number(pattern, found):
    override = Override.parse(f"{pattern}=skip")
    assert {index for index in (1, 2, 10, 11, 21) if override.matches(f"model.layers.{index}.mlp.up_proj")} == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("down_proj", "not of the form"),
        ("=bits:8", "not of the form"),
        ("x=bits:7", "override 'x=bits:7': bits 7 is not supported; use 2, 3, 4, 8 or 16"),
        ("x=bits:eight", "bits 'eight' is not supported"),
        ("x=bits:", "bits None is not supported"),
        ("x=sym:1", "sym 1 is neither true nor false"),
        ("x=speed:9", "unknown setting 'speed'; known are: bits, group_size, sym"),
        ("(=bits:8", "not a regular expression"),
    ],
)
def test_bad_overrides(text, says):
    with pytest.raises(QsunError) as caught:
        Override.parse(text)
    assert says in str(caught.value)


def test_a_pattern_may_hold_an_equals_sign():
    assert Override.parse("a=b=bits:8").pattern == "a=b"


def test_config_file(tmp_path):
    file = tmp_path / "quant.yaml"
    file.write_text("\ufeffbits: 3\ngroup-size: 64\ndamp_percent: 1e-3\noverrides: ['down_proj=bits:8']\n")
    config = QuantConfig.from_dict(read_config_file(file))
    assert (config.bits, config.group_size, config.damp_percent) == (3, 64, 1e-3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n", "is not a mapping"),
        ("a: [\n", "not YAML"),
        ("bits: 3\nbits: 4\n", "key 'bits' occurs twice"),
        ("a: !!python/name:os.system\n", "not YAML"),
        ("a: " + "x" * 2**20, "larger than 1048576 bytes"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, text, says):
    file = tmp_path / "quant.yaml"
    file.write_text(text)
    with pytest.raises(QsunError, match=says):
        read_config_file(file)


def test_an_absent_file(tmp_path):
    with pytest.raises(QsunError, match=r"cluster file .* No such file"):
        read_config_file(tmp_path / "absent.yaml", "cluster file")


class Inner(Section):
    count: Annotated[int, Field(ge=1)] = 1
    kind: Literal["a", "b"] = "a"


class Outer(Settings):
    needed: str
    inner: Inner = Inner()
    many: dict[str, Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "needed is missing; add it"),
        ({"needed": 1}, "needed 1 is not a string"),
        ({"needed": "x", "inner": {"count": 0}}, "inner.count 0 is out of range; use 1 or more"),
        (
            {"needed": "x", "inner": {"counts": 2}},
            "'inner.counts'; did you mean count? known are: count",
        ),
        ({"needed": "x", "many": {"m": {"kind": "c"}}}, "many.m.kind 'c' is not supported; use a or b"),
        ({"needed": "x", 1: 2}, "unknown setting '1'; known are: inner, many, needed"),
    ],
)
def test_errors_in_sections_name_their_place(values, says):
    with pytest.raises(QsunError) as caught:
        Outer.from_dict(values)
    assert says in str(caught.value)
