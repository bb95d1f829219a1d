"""The pass that ends where the KV cache is complete: the same K, V and gradients, and less work."""

import pytest
import torch
from transformers import DynamicCache

import qsun
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.prefill_pass import fill_cache
from tests.tiny_models import FAMILIES, random_tokens


def kv(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def whole_pass(model, cache, **inputs):
    model.model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_and_the_gradients_are_those_of_the_whole_pass(family, tiny_model):
    model = qsun.load_decode(tiny_model(family), "cpu", torch.float32).model.requires_grad_(True)
    tokens, found = torch.from_numpy(random_tokens(2, 20)), []
    for run in (fill_cache, whole_pass):
        cache = DynamicCache()
        for first in (0, 12):  # in two pieces, as long prompts are read
            positions = torch.arange(first, min(first + 12, 20))[None]
            run(model, cache, input_ids=tokens[:, first : first + 12], position_ids=positions)
        model.zero_grad()
        sum(tensor.sin().sum() for tensor in kv(cache)).backward()
        found.append((kv(cache), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert our_gradients.keys() == their_gradients.keys()
    assert all(torch.equal(gradient, their_gradients[name]) for name, gradient in our_gradients.items())


def test_the_last_layers_unused_half_is_not_computed(tiny_model):
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    fill_cache(model, DynamicCache(), input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert "model.layers.0.mlp" in ran and "model.layers.1.self_attn.v_proj" in ran
    assert not {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.norm"} & set(ran)


def test_errors_of_the_model_are_not_hidden(tiny_model):
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model
    with pytest.raises(IndexError):
        fill_cache(model, DynamicCache(), input_ids=torch.full((1, 4), 10_000))
