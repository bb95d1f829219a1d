"""Every family: the block walk sees what transformers computes, and the quantized model computes nearly the same."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsun
from qsun.data.calibration import Sample
from qsun.model.architectures import architecture_of
from qsun.model.checkpoint import Checkpoint
from qsun.model.skeleton import Skeleton, linear_of, read_model_config
from qsun.quantization.activations import Activations, make_batches
from qsun.quantization.block import fold_scales
from qsun.quantization.job import prepare
from tests.tiny_models import FAMILIES, SEQUENCE, random_tokens, reference

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-5, "atol": 2e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def open_activations(directory: Path, samples: tuple[Sample, ...]) -> Activations:
    skeleton = Skeleton(Checkpoint(directory), torch.float32, CPU)
    batches = make_batches(samples, CPU)
    return Activations(skeleton, batches, skeleton.embed([batch.tokens for batch in batches]))


def text_samples(rows: int = 3) -> tuple[Sample, ...]:
    return tuple(Sample(tuple(row)) for row in random_tokens(rows, SEQUENCE).tolist())


def block_inputs_and_outputs(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What enters block 0 and what leaves each block of transformers' own model."""
    seen: list[torch.Tensor] = []
    handles = [model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda _, __, out: seen.append(out)))
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return [item[0] if isinstance(item, tuple) else item for item in seen]


@every_family
def test_the_walk_carries_the_hidden_states_of_transformers(family, tiny_model):
    directory = tiny_model(family)
    ours = open_activations(directory, text_samples())
    expected = block_inputs_and_outputs(reference(directory), ours.batches[0].tokens)
    torch.testing.assert_close(ours.hidden[0], expected[0], **EXACT)
    for index, wanted in enumerate(expected[1:]):
        ours.start_block(index, ours.skeleton.load_block(index))
        ours.finish_block()
        torch.testing.assert_close(ours.hidden[0], wanted, **EXACT)
    assert len(expected) == 1 + len(ours.skeleton.layers)


@every_family
def test_each_stage_reads_what_its_layers_read_in_transformers(family, tiny_model):
    directory = tiny_model(family)
    ours = open_activations(directory, text_samples())
    model, architecture = reference(directory), architecture_of(family)
    seen: dict[str, torch.Tensor] = {}
    for index in range(len(model.model.layers)):
        for name in architecture.linear_names():
            full_name = f"model.layers.{index}.{name}"
            model.get_submodule(full_name).register_forward_pre_hook(
                lambda _, args, key=full_name: seen.__setitem__(key, args[0])
            )
    model(ours.batches[0].tokens, use_cache=False)
    for index in range(len(model.model.layers)):
        ours.start_block(index, ours.skeleton.load_block(index))
        for number, stage in enumerate(architecture.stages):
            for name in stage.layers:
                expected = seen.pop(f"model.layers.{index}.{name}")
                torch.testing.assert_close(ours.stage_input(number, 0), expected, **EXACT)
        ours.finish_block()
    assert not seen


@every_family
def test_the_residual_is_what_a_half_of_the_block_adds_to(family, tiny_model):
    """r + o_proj(x) after attention, and r + down_proj(x) after the MLP, in families that add outputs as they are."""
    architecture = architecture_of(family)
    if not architecture.output_added:
        pytest.skip("a norm lies between the output and the residual")
    ours = open_activations(tiny_model(family), text_samples())
    block = ours.skeleton.load_block(0)
    ours.start_block(0, block)
    outputs = []
    for number in (1, 3):
        project = linear_of(block, architecture.stages[number].layers[0])
        outputs.append(ours.residual(number, 0) + project(ours.stage_input(number, 0)))
    torch.testing.assert_close(outputs[0], ours.residual(3, 0), **EXACT)
    ours.finish_block()
    torch.testing.assert_close(outputs[1], ours.hidden[0], **EXACT)


@every_family
def test_a_changed_layer_shows_in_the_stages_after_it(family, tiny_model):
    """Replaying halves of a block must not bring back activations from before a weight changed."""
    ours = open_activations(tiny_model(family), text_samples())
    block = ours.skeleton.load_block(0)
    whole = copy.deepcopy(block)
    ours.start_block(0, block)
    for number, stage in enumerate(architecture_of(family).stages):
        ours.stage_input(number, 0)
        for name in stage.layers:
            for one in (block, whole):
                linear_of(one, name).weight.data *= 1.3
    ours.finish_block()
    fresh = open_activations(tiny_model(family), text_samples())
    fresh.start_block(0, whole)
    fresh.finish_block()
    torch.testing.assert_close(ours.hidden[0], fresh.hidden[0], **EXACT)


@every_family
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "refined"])
def test_eight_bits_change_the_logits_little(family, method, tiny_model, token_file, tmp_path):
    base = tiny_model(family, torch.bfloat16)
    config = qsun.QuantConfig(method=method, bits=8, group_size=32, seq_len=SEQUENCE)
    report = qsun.quantize(base, tmp_path / "out", config, token_file)
    stages = architecture_of(family).stages
    assert len(report["layers"]) == 2 * sum(len(stage.layers) for stage in stages)
    decode = qsun.load_decode(tmp_path / "out", dtype=torch.float32).model
    tokens = torch.from_numpy(random_tokens(2, SEQUENCE, seed=9))
    wanted, got = reference(base)(tokens).logits, decode(tokens).logits
    relative = (wanted - got).square().sum() / wanted.square().sum()
    assert 0 < relative < 1e-3, f"{family} {method}: relative squared error {relative:.2e}"


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in FAMILIES), ("llama", {"attention_bias": True, "mlp_bias": True})],
    ids=[*FAMILIES, "llama with biases"],
)
def test_folding_scales_leaves_the_function_alone(family, changes, tiny_model, token_file, tmp_path):
    """AWQ's first half only moves scales. K and V, which prefill modules write unscaled, keep their values."""
    directory = tiny_model(family, **changes)
    ours = open_activations(directory, text_samples())
    block = ours.skeleton.load_block(0)
    before = copy.deepcopy(block)
    ours.start_block(0, block)
    config = qsun.QuantConfig(method="awq", bits=3, group_size=32, format="compressed-tensors")
    architecture = architecture_of(family)
    fold_scales(prepare(directory, tmp_path / "out", config, token_file), 0, block, ours)
    changed = [name for name, p in before.named_parameters() if not torch.equal(p, block.get_parameter(name))]
    assert changed, "the fold found nothing to scale, so this test shows nothing"
    watched = [name for name in architecture.stages[0].layers if not name.endswith("q_proj")]
    for name in [*watched, "self_attn.o_proj"]:
        outputs = [run_until(ours, one, name) for one in (before, block)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert not [name for name in changed if name.startswith("self_attn.o_proj")]
    results = []
    for one in (before, block):
        fresh = open_activations(directory, text_samples())
        fresh.start_block(0, one)
        fresh.finish_block()
        results.append(fresh.hidden[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def run_until(ours: Activations, block: torch.nn.Module, name: str) -> torch.Tensor:
    """Output of one linear layer of a block."""
    seen: list[torch.Tensor] = []
    handle = block.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))
    block(ours.hidden[0], **ours.skeleton.block_arguments(0, ours.hidden[0]))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("skipped", ["mlp.(gate|up)_proj=skip", "self_attn=skip", "layers.1=skip"])
@pytest.mark.parametrize("method", ["awq", "refined"])
def test_layers_left_in_full_precision_keep_the_rest_right(skipped, method, tiny_model, token_file, tmp_path):
    """A skipped producer of a fold is stored in the base's dtype; the walk must go on with what was stored."""
    base = tiny_model("llama", torch.bfloat16)
    config = qsun.QuantConfig(method=method, bits=8, group_size=32, seq_len=SEQUENCE, overrides=(skipped,))
    qsun.quantize(base, tmp_path / "out", config, token_file)
    decode = qsun.load_decode(tmp_path / "out", dtype=torch.float32).model
    tokens = torch.from_numpy(random_tokens(2, SEQUENCE, seed=9))
    wanted, got = reference(base)(tokens).logits, decode(tokens).logits
    assert (wanted - got).square().sum() / wanted.square().sum() < 1e-3


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_biases_everywhere_come_through(method, tiny_model, token_file, tmp_path):
    base = tiny_model("llama", torch.bfloat16, attention_bias=True, mlp_bias=True)
    config = qsun.QuantConfig(method=method, bits=8, group_size=32, seq_len=SEQUENCE)
    qsun.quantize(base, tmp_path / "out", config, token_file)
    tokens = torch.from_numpy(random_tokens(2, SEQUENCE, seed=9))
    wanted = reference(base)(tokens).logits
    got = qsun.load_decode(tmp_path / "out", dtype=torch.float32).model(tokens).logits
    assert (wanted - got).square().sum() / wanted.square().sum() < 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_quantized_head_leaves_a_tied_embedding_alone(family, tiny_model, token_file, tmp_path):
    base = tiny_model(family, torch.bfloat16)
    config = qsun.QuantConfig(method="gptq", bits=8, group_size=32, seq_len=SEQUENCE, lm_head=True)
    qsun.quantize(base, tmp_path / "out", config, token_file)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert "lm_head.qweight" in after and "lm_head.weight" not in after
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tokens = torch.from_numpy(random_tokens(2, SEQUENCE, seed=9))
    wanted = reference(base)(tokens).logits
    got = qsun.load_decode(tmp_path / "out", dtype=torch.float32).model(tokens).logits
    assert (wanted - got).square().sum() / wanted.square().sum() < 1e-3


@every_family
def test_tying_stays_as_it_was(family, tiny_model, tmp_path):
    base = tiny_model(family, torch.bfloat16)
    qsun.quantize(base, tmp_path / "out", qsun.QuantConfig(method="rtn", bits=8, group_size=32))
    tied = bool(json.loads((base / "config.json").read_text())["tie_word_embeddings"])
    assert tied == bool(json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"])
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tied)
    model = qsun.load_decode(tmp_path / "out").model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_rope_written_by_older_transformers_is_understood(tiny_model, tmp_path):
    """Checkpoints on the hub hold rope_theta and rope_scaling; from_pretrained converts them, and so must we."""
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "old")
    values = json.loads((directory / "config.json").read_text())
    values.pop("rope_parameters", None)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    values |= {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    (directory / "config.json").write_text(json.dumps(values))
    ours = open_activations(directory, text_samples())
    expected = block_inputs_and_outputs(reference(directory), ours.batches[0].tokens)
    for index, wanted in enumerate(expected[1:]):
        ours.start_block(index, ours.skeleton.load_block(index))
        ours.finish_block()
        torch.testing.assert_close(ours.hidden[0], wanted, **EXACT)


def test_rotary_buffers_of_old_llama_checkpoints_are_passed_over(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "old")
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    qsun.quantize(directory, tmp_path / "out", qsun.QuantConfig(method="rtn", bits=8, group_size=32))
    qsun.load_decode(tmp_path / "out")


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("gemma3", "gemma3_text"),
        ("bert", "'bert' is not supported; known are llama"),
    ],
)
def test_other_architectures_are_refused_by_name(model_type, says, tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(qsun.QsunError, match=says) as error:
        qsun.quantize(directory, tmp_path / "out", qsun.QuantConfig(method="rtn"))
    assert repr(model_type) in str(error.value) and "\n" not in str(error.value)


def llama4_config(directory, wrapped=False, **changes):
    text = {
        "model_type": "llama4_text", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
        "intermediate_size_mlp": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "max_position_embeddings": 1 << 20, "moe_layers": [],
    } | changes  # fmt: skip
    values = {"model_type": "llama4", "text_config": text, "vision_config": {}} if wrapped else text
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    return read_model_config(directory)


@pytest.mark.parametrize("wrapped", [False, True])
def test_llama_4_is_limited_to_positions_of_plain_attention(wrapped, tmp_path):
    """Beyond its first chunk, attention forgets, and the temperature of layers without RoPE rises."""
    config = llama4_config(tmp_path / "a", wrapped)
    assert (config.model_type, config.max_position_embeddings) == ("llama4_text", 8191)
    assert llama4_config(tmp_path / "b", wrapped, attn_temperature_tuning=False).max_position_embeddings == 8192
    assert llama4_config(tmp_path / "c", wrapped, attention_chunk_size=512).max_position_embeddings == 512
    assert llama4_config(tmp_path / "d", wrapped, max_position_embeddings=300).max_position_embeddings == 300


def test_llama_4_with_experts(tmp_path):
    with pytest.raises(qsun.QsunError, match="has mixtures of experts"):
        llama4_config(tmp_path / "model", moe_layers=[1, 3])


def test_the_last_position_of_llama_4_is_exact(tmp_path, tiny_model):
    """Oracle: transformers' own masks and temperatures, which begin to differ one position later."""
    settings = {"attention_chunk_size": 16, "floor_scale": 14, "attn_scale": 5.0, "no_rope_layers": [1, 0]}
    directory = tiny_model("llama4_text", **settings)
    ours = qsun.load_decode(directory, "cpu", "float32").model
    limit = ours.config.max_position_embeddings
    assert limit == 13
    tokens = torch.from_numpy(random_tokens(1, limit + 1))
    with torch.no_grad():
        theirs = reference(directory)
        torch.testing.assert_close(ours(tokens[:, :limit]).logits, theirs(tokens[:, :limit]).logits, **EXACT)
        assert (ours(tokens).logits - theirs(tokens).logits)[0, -1].abs().max() > 0.01
