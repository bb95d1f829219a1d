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
from qsun.model.formats import unpack_rows
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
    with pytest.raises(qsun.QsunError, match=rf"has {odd}, which a llama model of 2 blocks does not"):
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


# --- what other tools store


@pytest.fixture(scope="module")
def stored(tiny_model, tmp_path_factory):
    """stored(format): a quantized tiny model with biases in attention; copy it before damaging it."""
    made = {}

    def make(fmt="gptq", **settings):
        key = (fmt, *settings.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("stored") / "out"
            config = qsun.QuantConfig(method="rtn", group_size=32, format=fmt, **settings)
            qsun.quantize(tiny_model("qwen2"), made[key], config)
        return made[key]

    return make


def edited(directory, to, edit=None, **config):
    """Copy a module; `edit` returns other tensors under the names that it is given, or None to drop them."""
    shutil.copytree(directory, to)
    file = to / "model.safetensors"
    tensors = {name: edit(name, tensor) if edit else tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | config))
    return to


def added(directory, to, **tensors):
    edited(directory, to)
    file = to / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})
    return to


def refused(directory, says):
    with pytest.raises(qsun.QsunError, match=says) as error:
        qsun.load_decode(directory, "cpu")
    assert "\n" not in str(error.value)


def bytes_of_zeros(name, tensor):
    """Zero points as compressed-tensors stored them before 0.10: signed, one a byte."""
    if not name.endswith("zero_point"):
        return tensor
    return (unpack_rows(tensor, 4, 8 * tensor.shape[0]).to(torch.int16) - 8).to(torch.int8)


def ten_a_word(name, tensor):
    """Integers of 3 bits as compressed-tensors packed them before 0.17."""
    if not name.endswith("weight_packed"):
        return tensor
    q = unpack_rows(tensor.t(), 3, tensor.shape[1] * 32 // 3).t().int()
    q = torch.nn.functional.pad(q, (0, -q.shape[1] % 10)).view(q.shape[0], -1, 10)
    return (q << 3 * torch.arange(10, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def short_words(name, tensor):
    """Integers as GPTQModel packs them with pack_dtype int16."""
    halves = tensor.view(torch.int16) if name.endswith("qzeros") else tensor
    return tensor.t().contiguous().view(torch.int16).t().contiguous() if name.endswith("qweight") else halves


def one_scale(name, tensor):
    return tensor[0, :1].clone() if name.endswith("weight_scale") else tensor


def without_scales(name, tensor):
    return None if name == "model.layers.0.mlp.up_proj.scales" else tensor


@pytest.mark.parametrize(
    ("settings", "edit", "says"),
    [
        (
            {"fmt": "compressed-tensors", "sym": False},
            bytes_of_zeros,
            r"weight_zero_point is I8 \[64, 4\], but 4 bits for 64 x 128 weights are I32 \[8, 4\]; quantize",
        ),
        (
            {"fmt": "compressed-tensors", "bits": 3},
            ten_a_word,
            r"weight_packed is I32 \[64, 13\], but 3 bits for 64 x 128 weights are I32 \[64, 12\]",
        ),
        ({}, short_words, r"qweight is I16 \[32, 64\], but 4 bits for 64 x 128 weights are I32 \[16, 64\]"),
        (
            {"fmt": "compressed-tensors"},
            one_scale,
            r"weight_scale is \[1\]; only scales for each group or output are supported",
        ),
        ({}, without_scales, r"has no tensor model\.layers\.0\.mlp\.up_proj\.scales"),
    ],
    ids=["zero points in bytes", "10 values a word", "int16 words", "one scale", "no scales"],
)
def test_integers_that_are_stored_in_another_way_are_refused(settings, edit, says, stored, tmp_path, cli):
    directory = edited(stored(**settings), tmp_path / "other", edit)
    refused(directory, says)
    assert cli("inspect", directory).code == 2


def test_transforms_at_run_time_are_refused(stored, tmp_path):
    extra = {"model.layers.0.mlp.down_proj.R4_input.weight": torch.eye(128)}
    refused(added(stored(), tmp_path / "rotated", **extra), "down_proj.R4_input.weight, which a qwen2 model")


def test_biases_are_as_config_json_says(stored, tmp_path):
    """AutoGPTQ once stored zeros as the bias of every layer."""
    name = "model.layers.0.mlp.down_proj.bias"
    zeros, ones = (added(stored(), tmp_path / str(n), **{name: torch.full((64,), float(n))}) for n in (0, 1))
    with torch.no_grad():
        expected = qsun.load_decode(stored(), "cpu", "float32").model(IDS).logits
        assert torch.equal(qsun.load_decode(zeros, "cpu", "float32").model(IDS).logits, expected)
    refused(ones, f"has {name}, which a qwen2 model of 2 blocks does not")
    without = edited(stored(), tmp_path / "without", lambda n, t: None if n.endswith("1.self_attn.q_proj.bias") else t)
    refused(without, r"has no tensor model\.layers\.1\.self_attn\.q_proj\.bias")


def test_scales_of_activations_and_of_the_cache_do_not_matter(stored, tmp_path):
    extra = {f"model.layers.0.self_attn.k_proj.{kind}_scale": torch.ones(1) for kind in ("input", "output")}
    module = added(stored("compressed-tensors"), tmp_path / "scales", **extra)
    with torch.no_grad():
        expected, found = (
            qsun.load_decode(d, "cpu", "float32").model(IDS).logits for d in (stored("compressed-tensors"), module)
        )
    assert torch.equal(found, expected)


def blocks(count):
    return {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (blocks(1), r"has model\.layers\.1\..*, which a qwen2 model of 1 blocks does not"),
        (blocks(3), r"has no tensor model\.layers\.2\."),
        ({"num_key_value_heads": 4}, r"layers\.0\.self_attn\.k_proj has 32 outputs, but config\.json says 64"),
        ({"vocab_size": 130}, r"model\.embed_tokens\.weight is \[128, 64\], but config\.json says \[130, 64\]"),
        ({"quantization_config": "gptq"}, "quantization_config 'gptq' is not a JSON object"),
        ({"quantization_config": ["gptq"]}, r"quantization_config \['gptq'\] is not a JSON object"),
    ],
    ids=["fewer blocks", "more blocks", "key heads", "vocabulary", "a string", "a list"],
)
def test_a_config_of_another_model_is_refused(changes, says, stored, tiny_model, tmp_path):
    refused(edited(stored(), tmp_path / "quantized", **changes), says)
    if "quantization_config" not in changes:
        refused(edited(tiny_model("qwen2"), tmp_path / "plain", **changes), r"no tensor|does not|config\.json says")


def test_a_quantized_head_of_embeddings_that_are_tied_in_the_file(stored, tmp_path):
    """The stored head decides, as one in full precision does."""
    own = stored(lm_head=True)
    tied = edited(own, tmp_path / "tied", tie_word_embeddings=True)
    with torch.no_grad():
        expected, found = (qsun.load_decode(d, "cpu", "float32").model(IDS).logits for d in (own, tied))
    assert torch.equal(found, expected)
