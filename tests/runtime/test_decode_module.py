"""load_decode against transformers with the same weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qsun
from qsun.demo import base_directory, calibration_file
from qsun.model.checkpoint import Checkpoint
from qsun.model.stored_layers import quantized_layer_names, read_quantized_layer

IDS = torch.tensor([[1, 99, 97, 108, 99, 32, 49, 50, 43, 55, 62]])


@pytest.fixture(scope="module", params=["gptq", "awq", "compressed-tensors"])
def module(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("decode") / request.param
    config = qsun.QuantConfig(method="rtn", format=request.param, group_size=64, sym=request.param != "awq")
    qsun.quantize("demo", out, config)
    return out, request.param


def dense_twin(directory, fmt):
    """transformers' own model, its linear layers holding the dequantized weights."""
    model = AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32).eval()
    checkpoint = Checkpoint(directory)
    for name in quantized_layer_names(checkpoint):
        linear = model.get_submodule(name)
        linear.weight.data = read_quantized_layer(checkpoint, name, fmt, linear.in_features)[0].dequantize()
    return model


@torch.no_grad()
def test_logits_and_generation_equal_the_dense_twin(module):
    directory, fmt = module
    decode = qsun.load_decode(directory, dtype="float32")
    twin = dense_twin(directory, fmt)
    assert torch.equal(decode.model(IDS).logits, twin(IDS).logits)
    ours, theirs = (m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (decode.model, twin))
    assert torch.equal(ours, theirs)
    assert decode.manifest["config"]["method"] == "rtn"
    assert sum(isinstance(m, qsun.QuantLinear) for m in decode.model.modules()) == 28


@torch.no_grad()
def test_dtypes(module):
    directory, _ = module
    exact = qsun.load_decode(directory, dtype="float32").model(IDS).logits
    default = qsun.load_decode(directory)
    assert default.model.model.embed_tokens.weight.dtype == torch.bfloat16  # what the base is stored in
    assert (default.model(IDS).logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_base_loads_as_a_decode_module():
    decode = qsun.load_decode("demo", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(decode.model(IDS).logits, base(IDS).logits)
    assert decode.manifest == {}
    assert decode.model.lm_head.weight is decode.model.model.embed_tokens.weight


def test_gradients_reach_the_input_through_every_layer(module):
    """Those of the dense twin: past a layer that stopped them, the residual stream would still bring some."""
    directory, fmt = module
    found = []
    for model in (qsun.load_decode(directory, dtype="float32").model, dense_twin(directory, fmt)):
        embeds = model.model.embed_tokens(IDS).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.logsumexp(-1).sum().backward()
        found.append(embeds.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * found[1].abs().max().item())


def test_a_missing_tensor_is_named(module, tmp_path):
    directory, _ = module
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(qsun.QsunError, match=r"model\.norm\.weight"):
        qsun.load_decode(tmp_path)


def test_quantized_head_unties(tmp_path):
    config = qsun.QuantConfig(method="gptq", lm_head=True, group_size=64, samples=8, seq_len=128)
    report = qsun.quantize("demo", tmp_path / "out", config, calibration_file())
    assert report["layers"][-1]["name"] == "lm_head"
    decode = qsun.load_decode(tmp_path / "out", dtype="float32")
    assert isinstance(decode.model.lm_head, qsun.QuantLinear)
    with torch.no_grad():
        logits = decode.model(IDS).logits
        base = qsun.load_decode("demo", dtype="float32").model
        expected = base(IDS).logits
    assert torch.equal(decode.model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert 0 < (logits - expected).abs().max() < 0.5 * expected.abs().max()


def test_tensors_that_no_module_uses(tiny_model, tmp_path, caplog):
    """Outside of the blocks they are left out with a warning, as `qsun quantize` does; inside they are an error."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"mtp.proj.weight": torch.ones(2, 2)}, directory / "model.safetensors", {"format": "pt"})
    ours, theirs = (qsun.load_decode(d, "cpu", "float32").model for d in (directory, tiny_model("llama")))
    assert "1 tensors that the model does not use, such as mtp.proj.weight, are left out" in caplog.text
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    odd = "model.layers.0.self_attn.gate.weight"
    save_file(tensors | {odd: torch.ones(2, 2)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(qsun.QsunError, match=rf"does not fit its config\.json: missing nothing, unknown .*{odd}"):
        qsun.load_decode(directory, "cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "flot16"}, "dtype 'flot16' is not supported; use one of float32, bfloat16, float16"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"device": "abacus"}, "device 'abacus' is not known"),
    ],
)
def test_what_cannot_be_loaded_is_refused(settings, message):
    with pytest.raises(qsun.QsunError, match=message):
        qsun.load_decode("demo", **settings)


def test_an_answer_ends_with_the_models_tokens_and_with_the_tokenizers(tmp_path):
    """Tuning ends responses with the tokenizer's; a ChatML fine-tune often keeps its base's config.json."""
    other = shutil.copytree(base_directory(), tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        found = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps({**found, "eos_token_id": 3}))
    decode = qsun.load_decode(other, "cpu")
    assert decode.eos_tokens == {3, decode.tokenizer.eos_token_id} != {3}
