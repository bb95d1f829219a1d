"""Inputs of many shapes: a module has the weights that transformers would use, and reports what it leaves out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import qsun
from qsun.model.checkpoint import Checkpoint
from qsun.model.skeleton import HEAD, read_model_config
from tests.quantization.test_resume import interrupt_at
from tests.tiny_models import SEQUENCE, SIZES, build_model, random_tokens, reference

IDS = torch.from_numpy(random_tokens(2, 20))
NEAR = qsun.QuantConfig(method="rtn", bits=8, group_size=32)


def gemma3() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
    config = Qwen2VLConfig(text_config=SIZES | {"rope_parameters": rope}, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def quantized_logits(base: Path, out: Path) -> torch.Tensor:
    qsun.quantize(base, out, NEAR)
    return logits(qsun.load_decode(out, dtype="float32").model)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("build", [gemma3, qwen2_vl])
def test_the_text_model_of_a_multimodal_one(build, flat, tmp_path, caplog):
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "whole")
    if flat:  # as config.json of the first Qwen2-VL, and the tensors of later Gemma 3
        config = json.loads((tmp_path / "whole" / "config.json").read_text())
        if build is qwen2_vl:
            text = config.pop("text_config")
            (tmp_path / "whole" / "config.json").write_text(json.dumps(text | config))
        tensors = load_file(tmp_path / "whole" / "model.safetensors")
        renamed = {name.replace("language_model.model.", "model.language_model."): t for name, t in tensors.items()}
        save_file(renamed, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    wanted = logits(model)
    torch.testing.assert_close(logits(qsun.load_decode(tmp_path / "whole", dtype="float32").model), wanted)
    found = quantized_logits(tmp_path / "whole", tmp_path / "out")
    assert divergence(wanted, found) < 1e-3
    assert "the text model (" in caplog.text and "are left out" in caplog.text
    plain = json.loads((tmp_path / "out" / "config.json").read_text())
    assert plain["model_type"] == {gemma3: "gemma3_text", qwen2_vl: "qwen2"}[build]
    assert "vision_config" not in plain and plain["architectures"][0].endswith("ForCausalLM")
    assert all(
        name.startswith(("model.layers.", "model.embed", "model.norm", "lm_head"))
        for name in Checkpoint(tmp_path / "out").names()
    )


def test_names_without_the_models_prefix(tmp_path):
    base = build_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(base)), wanted)
    assert divergence(wanted, quantized_logits(base, tmp_path / "out")) < 1e-3


def test_a_single_file_beside_the_index_of_older_shards(tmp_path, caplog):
    base = build_model(tmp_path / "base", "llama", seed=0)
    old = AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "old", "llama", seed=1))
    old.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copyfile(file, base / file.name)
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    assert divergence(wanted, logits(old)) > 0.01
    assert divergence(wanted, quantized_logits(base, tmp_path / "out")) < 1e-3
    assert "the first is read, as transformers does" in caplog.text


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_of_its_own_beside_tied_embeddings(differs, tmp_path):
    """transformers unties them where the weights differ."""
    base = build_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors[HEAD] = head.flip(0) if differs else head
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    assert read_model_config(base).tie_word_embeddings is not differs
    assert divergence(wanted, quantized_logits(base, tmp_path / "out")) < 1e-3
    assert (HEAD in Checkpoint(tmp_path / "out")) == differs
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not differs


def test_a_tensor_outside_the_blocks_that_the_model_has_not(tmp_path, caplog):
    base = build_model(tmp_path / "base", "llama")
    wanted = logits(AutoModelForCausalLM.from_pretrained(base))
    tensors = load_file(base / "model.safetensors") | {"value_head.weight": torch.ones(1, 64)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert divergence(wanted, quantized_logits(base, tmp_path / "out")) < 1e-3
    assert "1 tensors that the model does not use, such as value_head.weight, are left out" in caplog.text


def test_the_default_group_fits_the_model(tmp_path, caplog):
    base = build_model(tmp_path / "base", "llama", hidden_size=192)
    report = qsun.quantize(base, tmp_path / "out", qsun.QuantConfig(method="rtn"))
    assert {layer["group_size"] for layer in report["layers"]} == {64}
    assert "group_size 128 does not divide all layers' inputs; 64 is used" in caplog.text
    with pytest.raises(qsun.QsunError, match="group_size 128 does not divide in_features 192"):
        qsun.quantize(base, tmp_path / "named", qsun.QuantConfig(method="rtn", group_size=128))


@pytest.mark.parametrize("part", ["model.embed_tokens.weight", "norm.weight", "bias"])
@pytest.mark.parametrize(("usual", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_awq_of_tensors_of_two_dtypes(usual, other, part, token_file, tmp_path):
    base = build_model(tmp_path / "base", "llama", usual, mlp_bias=True)
    tensors = load_file(base / "model.safetensors")
    mixed = {name: t.to(other) if name.endswith(part) else t for name, t in tensors.items()}
    save_file(mixed, base / "model.safetensors", {"format": "pt"})
    config = qsun.QuantConfig(method="awq", bits=8, group_size=32, samples=8, seq_len=SEQUENCE)
    qsun.quantize(base, tmp_path / "out", config, token_file, device="cpu")
    before, after = Checkpoint(base), Checkpoint(tmp_path / "out")
    assert all(after.dtype(name) == before.dtype(name) for name in after.names() if name in before)
    found = logits(qsun.load_decode(tmp_path / "out", device="cpu", dtype="float32").model)
    assert divergence(logits(reference(base)), found) < 1e-3


@pytest.mark.parametrize("method", ["rtn", "awq", "refined"])
def test_what_is_not_quantized_is_the_bases_whatever_the_computation_is_in(method, token_file, tmp_path):
    """AWQ divides what makes a layer's input, in the precision that the base has."""
    base = build_model(tmp_path / "base", "llama", mlp_bias=True)
    config = qsun.QuantConfig(method=method, group_size=32, samples=8, seq_len=SEQUENCE, dtype="bfloat16")
    qsun.quantize(base, tmp_path / "out", config.replace(overrides=("o_proj=skip",)), token_file, device="cpu")
    before, after = (Checkpoint(path).load for path in (base, tmp_path / "out"))
    kept = [name for name in Checkpoint(tmp_path / "out").names() if name in Checkpoint(base)]
    assert sum("o_proj.weight" in name for name in kept) == 2
    changed = [name for name in kept if not torch.equal(before([name])[name], after([name])[name])]
    assert bool(changed) == (method == "awq")
    for name in changed:
        assert name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight", "up_proj.bias"))
        assert not torch.equal(after([name])[name], after([name])[name].bfloat16().float())


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_into_one_output(resume, tmp_path):
    base = build_model(tmp_path / "base", "llama")
    refusals: list[str] = []

    def second(*_: Any) -> None:
        if not refusals:
            with pytest.raises(qsun.QsunError, match="another run is writing") as caught:
                qsun.quantize(base, tmp_path / "out", NEAR, resume=resume)
            refusals.append(str(caught.value))

    qsun.quantize(base, tmp_path / "out", NEAR, progress=second)
    assert refusals and str(tmp_path / "out.partial") in refusals[0]
    assert (tmp_path / "out" / "qsun.json").exists() and not (tmp_path / "out" / "lock").exists()


def test_a_stopped_run_holds_no_lock(tmp_path):
    base = build_model(tmp_path / "base", "llama")
    with pytest.raises(KeyboardInterrupt) as stopped:
        qsun.quantize(base, tmp_path / "out", NEAR, progress=interrupt_at(4))
    qsun.quantize(base, tmp_path / "out", NEAR, resume=True)
    assert stopped.value is not None  # its traceback kept the run's objects until here
