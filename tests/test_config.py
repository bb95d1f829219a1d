"""QuantConfig: validated once, the same from Python, YAML and the command line."""

import pytest

from qsun.config import LayerSpec, Override, QuantConfig, read_config_file
from qsun.errors import QsunError


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 5}, "bits 5 is not supported; use one of 2, 3, 4, 8"),
        ({"bits": "4"}, "bits '4'"),
        ({"bits": True}, "bits True"),
        ({"group_size": 96}, "use one of -1, 32, 64, 128"),
        ({"method": "magic"}, "refined"),
        ({"format": "gguf"}, "compressed-tensors"),
        ({"sym": 1}, "sym 1"),
        ({"samples": 0}, "samples 0 is out of range"),
        ({"seq_len": 1}, "seq_len 1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 0.5}, "not a whole number"),
        ({"damp_percent": 0.0}, "damp_percent"),
        ({"damp_percent": float("nan")}, "damp_percent"),
        ({"dtype": "int8"}, "bfloat16"),
    ],
)
def test_bad_values_name_themselves_and_the_limit(settings, says):
    with pytest.raises(QsunError) as caught:
        QuantConfig(**settings)
    assert says in str(caught.value)


def test_round_trip_and_unknown_keys():
    config = QuantConfig(bits=3, sym=False, overrides=("down_proj=bits:8,group_size:32", "layers.0=skip"))
    assert QuantConfig.from_dict(config.to_dict()) == config
    with pytest.raises(QsunError, match="unknown setting 'bit'; known are: bits"):
        QuantConfig.from_dict({"bit": 4})


def test_overrides_apply_in_order():
    config = QuantConfig(overrides=("mlp=bits:8", "down_proj=bits:4,sym:false", r"layers\.0\.=skip"))
    assert config.spec_for("model.layers.1.mlp.up_proj") == LayerSpec(8, 128, True)
    assert config.spec_for("model.layers.1.mlp.down_proj") == LayerSpec(4, 128, False)
    assert config.spec_for("model.layers.1.self_attn.q_proj") == LayerSpec(4, 128, True)
    assert not config.spec_for("model.layers.0.mlp.up_proj").quantized


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("down_proj", "not of the form"),
        ("=bits:8", "not of the form"),
        ("x=bits:7", "bits in override 'x' 7"),
        ("x=bits:eight", "'eight' is no value"),
        ("x=speed:9", "it can set bits, group_size and sym"),
        ("(=bits:8", "not a regular expression"),
    ],
)
def test_bad_overrides(text, says):
    with pytest.raises(QsunError, match=None) as caught:
        Override.parse(text)
    assert says in str(caught.value)


def test_a_pattern_may_hold_an_equals_sign():
    assert Override.parse("a=b=bits:8").pattern == "a=b"


def test_config_file(tmp_path):
    file = tmp_path / "quant.yaml"
    file.write_text("bits: 3\noverrides: ['down_proj=bits:8']\n")
    assert QuantConfig.from_dict(read_config_file(file)).bits == 3
    file.write_text("- 1\n")
    with pytest.raises(QsunError, match="no mapping"):
        read_config_file(file)
    file.write_text("a: [\n")
    with pytest.raises(QsunError, match="not YAML"):
        read_config_file(file)
    with pytest.raises(QsunError, match="No such file"):
        read_config_file(tmp_path / "absent.yaml")
