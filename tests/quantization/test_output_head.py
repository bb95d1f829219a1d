"""An output projection with settings of its own: the files, the configuration and the loader agree."""

import json
import os

import pytest

import qsun
from qsun.model.checkpoint import Checkpoint
from qsun.model.inspection import describe

FAST = {"method": "rtn", "group_size": 32}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("pattern", ["lm_head=skip", "lm_head|q_proj|k_proj|v_proj=skip"])
@pytest.mark.parametrize(("family", "fmt"), [("llama", "gptq"), ("qwen2", "gptq"), ("qwen2", "compressed-tensors")])
def test_an_override_takes_back_the_quantized_head(tiny_model, tmp_path, pattern, family, fmt):
    """qwen2's is tied to the embedding: nothing else may say that it is there."""
    base = tiny_model(family)
    settings = qsun.QuantConfig(**FAST, format=fmt, lm_head=True, overrides=(pattern,))
    qsun.quantize(base, tmp_path / "q", settings)
    assert Checkpoint(tmp_path / "q").names("lm_head.") == ([] if family == "qwen2" else ["lm_head.weight"])
    written = config_of(tmp_path / "q")
    assert written["tie_word_embeddings"] == config_of(base)["tie_word_embeddings"]
    assert not written["quantization_config"].get("lm_head")
    decode = qsun.load_decode(tmp_path / "q")
    assert not isinstance(decode.model.lm_head, qsun.QuantLinear)


def test_a_head_with_bits_of_its_own_is_in_the_configuration(tiny_model, tmp_path):
    settings = qsun.QuantConfig(**FAST, lm_head=True, overrides=("lm_head=bits:8",))
    qsun.quantize(tiny_model("llama"), tmp_path / "q", settings)
    stored = config_of(tmp_path / "q")["quantization_config"]
    assert stored["lm_head"] is True
    assert [entry["bits"] for pattern, entry in stored["dynamic"].items() if "lm_head" in pattern] == [8]
    assert qsun.load_decode(tmp_path / "q").model.lm_head.bits == 8


def test_inspect_says_what_quantize_said_of_mixed_symmetry(tiny_model, tmp_path):
    for sym, override in ((True, "down_proj=sym:false"), (False, "down_proj=sym:true")):
        out = tmp_path / str(sym)
        report = qsun.quantize(tiny_model("llama"), out, qsun.QuantConfig(**FAST, sym=sym, overrides=(override,)))
        found = describe(out)
        assert found["engines"] == report["engines"]
        assert {layer["sym"] for layer in found["layers"] if "down_proj" in layer["name"]} == {not sym}
        assert {layer["sym"] for layer in found["layers"] if "o_proj" in layer["name"]} == {sym}


def test_an_output_that_no_rename_can_replace_is_refused_before_work(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    with pytest.raises(qsun.QsunError, match="is a link or a mount point; give one inside it"):
        qsun.quantize(tiny_model("llama"), tmp_path / "link", qsun.QuantConfig(**FAST))
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "big"))
    with pytest.raises(qsun.QsunError, match="mount point"):
        qsun.quantize(tiny_model("llama"), tmp_path / "big", qsun.QuantConfig(**FAST))
    qsun.quantize(tiny_model("llama"), tmp_path / "big" / "module", qsun.QuantConfig(**FAST))
