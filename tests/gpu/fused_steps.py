"""Logits of whole decode steps, in fused blocks and in transformers' own, on whatever device pytorch calls "cuda"."""

import copy

import torch
from transformers import AutoConfig

from qsun.engine.decode.decode_step import DecodeStep
from qsun.engine.decode.fixed_slots import FixedSlots, budget_for
from qsun.eval.speed.contenders import quantized_model, random_model
from qsun.runtime.fused_block import FusedBlock, fuse_blocks
from qsun.runtime.fused_projections import merge_projections

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
FILLED = (5, 300, 130)  # tokens of each row: within a split of attention, over several, at the edge of one
STEPS = 3


def logits(model, kv_dtype):
    """(STEPS, rows, vocabulary) of rows with the same keys and values for every model."""
    device, config = model.model.embed_tokens.weight.device, model.config
    drawn = torch.Generator().manual_seed(0)
    cache = FixedSlots(model, budget_for(model, len(FILLED), max(FILLED) + STEPS), kv_dtype)
    for filled in FILLED:
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, filled, config.head_dim)
        layers = torch.randn(shape, generator=drawn).to(device, torch.bfloat16)
        cache.place([(each[0], each[1]) for each in layers], filled, filled + STEPS)
    step, found = DecodeStep(model, cache), []
    for number in range(STEPS):
        found.append(step([[7 * row + number + 1] for row in range(len(FILLED))])[:, 0].clone().cpu().float())
    return torch.stack(found)


def check(family, bits, kv_dtype):
    """Fused blocks give the logits of the others; fp8 KV those of 16 bits, less exactly; and the same bits twice."""
    config = AutoConfig.for_model(family, **SIZES)
    plain = random_model(config, torch.device("cuda"), seed=0)
    if bits:
        plain = quantized_model(plain, config, bits)
    else:
        merge_projections(plain, config, dense=True)
    fused = copy.copy(plain)  # of the same weights
    fused._modules = dict(plain._modules) | {"model": copy.copy(plain.model)}
    fused.model._modules = dict(plain.model._modules) | {"layers": torch.nn.ModuleList(plain.model.layers)}
    fuse_blocks(fused, config)
    assert all(isinstance(block, FusedBlock) for block in fused.model.layers)
    assert not any(isinstance(block, FusedBlock) for block in plain.model.layers)
    wanted, found = logits(plain, kv_dtype), logits(fused, kv_dtype)
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert torch.equal(found, logits(fused, kv_dtype))
    if kv_dtype == "fp8":
        assert (found - logits(plain, "auto")).norm() < 0.1 * wanted.norm()
