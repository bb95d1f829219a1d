"""A fused decode step on a pretended CUDA device: the logits of the blocks themselves, at most ten kernels a layer."""

import inspect
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaModel

from qsun.eval.speed.contenders import quantized_model, random_model
from qsun.kernels import packed_triton
from qsun.kernels.launch_table import load_launch_table
from qsun.runtime.fused_block import FusedBlock, fuse_blocks
from qsun.runtime.fused_projections import merge_projections
from qsun.runtime.seam import seam_masks

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64, "pad_token_id": 0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 64, "pad_token_id": 0, "layer_types": MIXED},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LENGTHS = [3, 17, 9]


class Slots:
    """A cache of rows that each have a length, as the engine's."""

    def __init__(self, config, columns, dtype):
        shape = (2, len(LENGTHS), config.num_key_value_heads, columns, config.head_dim)
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(shape, generator=generator).to("cuda", dtype) for _ in range(config.num_hidden_layers)]
        self.buffers, self.dtype = [(layer[0], layer[1]) for layer in layers], dtype
        self.lengths, self.view = torch.tensor(LENGTHS, device="cuda"), (len(LENGTHS), columns)

    def update(self, keys, values, layer, *_, **__):
        numbers = torch.arange(len(LENGTHS), device="cuda")
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[numbers, :, self.lengths] = new[:, :, 0]
        return self.buffers[layer]

    def get_seq_length(self, *_):
        return self.view[1] - 1

    get_query_offset = get_seq_length

    def get_mask_sizes(self, *_):
        return self.view[1], 0


def config_of(family, layers=2):
    return AutoConfig.for_model(family, **SIZES | {"num_hidden_layers": layers} | FAMILIES[family])


def model_of(config, quantized, dtype=torch.bfloat16):
    model = random_model(config, torch.device("cuda"), seed=0)
    if quantized:
        return quantized_model(model, config)
    merge_projections(model, config, dense=True)
    return model


def step(model, cache, tokens):
    at = cache.lengths[:, None]
    masks = seam_masks(model, torch.zeros_like(cache.lengths), at, cache.view[1])
    return model(input_ids=tokens, attention_mask=masks, position_ids=at, use_cache=True, **{CACHE: cache}).logits[
        :, -1
    ]


def steps(model, log):
    """Logits of three steps, and the launches of the last."""
    cache, found = Slots(model.config, 24, torch.bfloat16), []
    for number in range(3):
        log.launches.clear()
        found.append(step(model, cache, torch.full((len(LENGTHS), 1), 7 + number, device="cuda")).cpu().float())
        cache.lengths += 1
    return torch.stack(found), [launch["kernel"] for launch in log.launches]


@pytest.mark.parametrize("quantized", [True, False], ids=["int4", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_the_blocks_themselves(pretend_cuda, family, quantized):
    config = config_of(family)
    model = model_of(config, quantized)
    wanted, launched = steps(model, pretend_cuda)
    assert "split_attention" not in launched
    fuse_blocks(model, config)
    assert all(isinstance(block, FusedBlock) for block in model.model.layers)
    logits, launched = steps(model, pretend_cuda)
    assert launched.count("split_attention") == config.num_hidden_layers
    assert (logits - wanted).norm() < 0.02 * wanted.norm()


def layer_kernels(log, quantized, fused, family="llama"):
    """Kernels that one more layer adds to a captured step."""
    counted = []
    for layers in (2, 3):  # two have both types of attention, and masks of both
        config = config_of(family, layers)
        model = model_of(config, quantized)
        if fused:
            fuse_blocks(model, config)
        cache, tokens = (
            Slots(config, 24, torch.bfloat16),
            torch.zeros(len(LENGTHS), 1, dtype=torch.int64, device="cuda"),
        )
        step(model, cache, tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model, cache, tokens)
        counted.append(graph.kernels)
    return counted[1] - counted[0]


@pytest.mark.parametrize(("quantized", "most"), [(True, 8), (False, 10)], ids=["int4", "bf16"])
def test_kernels_of_a_layer(pretend_cuda, quantized, most):
    fused, plain = (layer_kernels(pretend_cuda, quantized, fused) for fused in (True, False))
    assert sum(fused.values()) <= most, fused
    assert sum(plain.values()) >= 25  # so that the limit above means something


def test_kernels_of_a_layer_with_four_norms(pretend_cuda):
    fused, plain = (layer_kernels(pretend_cuda, True, fused, "gemma2") for fused in (True, False))
    assert sum(fused.values()) == 12, fused
    assert sum(plain.values()) >= 50


@pytest.mark.parametrize("off", ["", "sm_80", "the table"])
def test_kernels_wait_for_the_ones_before_them(pretend_cuda, monkeypatch, off):
    """A kernel that starts before its inputs are there waits for them: all kernels of a layer do both, or neither."""
    table = load_launch_table("NVIDIA H200")
    if off == "sm_80":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    if off == "the table":
        held = replace(table, dependent_launch=False)
        monkeypatch.setattr(packed_triton, "load_launch_table", lambda _: held)
    config = config_of("qwen3")
    model = model_of(config, quantized=True)
    fuse_blocks(model, config)
    steps(model, pretend_cuda)
    options = [(launch["PDL"], launch.get("launch_pdl", False)) for launch in pretend_cuda.launches]
    assert len(options) >= 8 * config.num_hidden_layers
    assert set(options) == {(not off, not off)}


def test_a_captured_step_follows_its_inputs(pretend_cuda):
    config = config_of("qwen3")
    model = model_of(config, quantized=True)
    fuse_blocks(model, config)
    cache, tokens = Slots(config, 24, torch.bfloat16), torch.full((len(LENGTHS), 1), 5, device="cuda")
    step(model, cache, tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, cache, tokens)
    other = Slots(config, 24, torch.bfloat16)
    for token in (5, 11):
        tokens.fill_(token)
        graph.replay()
        wanted = step(model, other, tokens)
        assert torch.equal(captured.cpu(), wanted.cpu())
        for each in (cache, other):
            each.lengths += 1


def test_parts_keep_their_names(pretend_cuda):
    config = config_of("llama")
    model = model_of(config, quantized=False)
    names = list(model.state_dict())
    fuse_blocks(model, config)
    assert list(model.state_dict()) == names
    assert {p.device for p in model.to("cuda:1").parameters()} == {torch.device("cuda:1")}


@pytest.mark.parametrize("case", ["several tokens", "gradients", "another cache"])
def test_what_the_block_itself_computes(pretend_cuda, case):
    config = config_of("llama")
    model = model_of(config, quantized=True)
    fuse_blocks(model, config)
    tokens = torch.full((3, 2 if case == "several tokens" else 1), 3, device="cuda")
    pretend_cuda.launches.clear()
    with torch.set_grad_enabled(case == "gradients"):
        if case == "gradients":
            step(model, Slots(config, 24, torch.bfloat16), tokens)
        else:
            model(input_ids=tokens, use_cache=True)
    assert "split_attention" not in {launch["kernel"] for launch in pretend_cuda.launches}


def test_families_that_stay_as_they_are(pretend_cuda):
    config = AutoConfig.for_model("olmo2", **SIZES | {"num_hidden_layers": 2})
    model = random_model(config, torch.device("cuda"), seed=0)
    merge_projections(model, config, dense=True)
    fuse_blocks(model, config)
    assert not any(isinstance(block, FusedBlock) for block in model.model.layers)
