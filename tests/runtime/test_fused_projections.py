"""Merged projections compute what the separate layers compute, in every family and however they are called."""

import threading

import pytest
import torch

import qsun
from qsun.model.architectures import architecture_of
from qsun.runtime.fused_projections import GatedMLP, Merged, MergedPart, merge_block
from tests.kernels.test_int4_cpu import random_weights
from tests.tiny_models import FAMILIES, random_tokens


@pytest.fixture
def quantized(tiny_model, tmp_path):
    def make(family, dtype=torch.float32, **options):
        config = qsun.QuantConfig(method="rtn", group_size=32, **options)
        qsun.quantize(tiny_model(family, dtype), tmp_path / "out", config, device="cpu")
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(family, quantized):
    directory = quantized(family)
    ids = torch.from_numpy(random_tokens(3, 17))
    separate = qsun.load_decode(directory, device="cpu", merge=False).model(ids).logits
    merged = qsun.load_decode(directory, device="cpu", merge=True)
    kinds = {type(module) for module in merged.model.modules()}
    assert (MergedPart in kinds) == (family != "phi3")
    assert (GatedMLP in kinds) == (family not in ("phi3", "gemma2", "gemma3_text"))
    assert torch.allclose(merged.model(ids).logits, separate, atol=1e-5)


def first_blocks(directory):
    """The first block with separate and with merged projections."""
    modules = [qsun.load_decode(directory, device="cpu", merge=merge, keep_dense=False) for merge in (False, True)]
    return [module.model.model.layers[0] for module in modules]


def test_rows_in_bfloat16_are_bitwise_the_same(quantized):
    separate, merged = first_blocks(quantized("qwen2", torch.bfloat16))  # it has biases
    x = torch.randn(3, 64).bfloat16()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(merged.self_attn, name)(x), getattr(separate.self_attn, name)(x))
    halves = merged.mlp.gate_up(x).chunk(2, -1)
    assert torch.equal(halves[0], separate.mlp.gate_proj(x))
    assert torch.equal(halves[1], separate.mlp.up_proj(x))


def test_a_gated_mlp_in_bfloat16_is_within_its_rounding(quantized):
    separate, merged = first_blocks(quantized("qwen2", torch.bfloat16))
    x = torch.randn(3, 64).bfloat16()
    wanted = separate.mlp(x).float()
    assert (merged.mlp(x).float() - wanted).norm() <= 2**-7 * wanted.norm()  # SiLU may round differently


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj"])
def test_layers_that_differ_stay_apart(name, quantized):
    block, _ = first_blocks(quantized("llama"))
    layer = block.get_submodule(name)
    block.set_submodule(name, qsun.QuantLinear(layer.quantized(), None, 8))
    merge_block(block, architecture_of("llama"), silu=True)
    kinds = {part: type(block.get_submodule(part)) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp")}
    assert (kinds["self_attn.q_proj"] is MergedPart) == (name != "self_attn.q_proj")
    assert (kinds["self_attn.k_proj"] is MergedPart) == (name != "self_attn.q_proj")
    assert (kinds["mlp"] is GatedMLP) == (name != "mlp.up_proj")


def test_layers_of_8_bits_are_merged_too(quantized):
    _, merged = first_blocks(quantized("llama", overrides=["layers.0.*(q|k|v)_proj=bits:8"]))
    assert isinstance(merged.self_attn.q_proj, MergedPart)
    assert merged.self_attn.q_proj.merged.layer.bits == 8


def test_gradients_pass_through(quantized):
    directory = quantized("llama")
    hidden = [torch.randn(1, 5, 64, requires_grad=True)]
    hidden.append(hidden[0].detach().clone().requires_grad_())
    direction = torch.randn(1, 5, 64)
    for merge, x in zip((False, True), hidden, strict=True):
        mlp = qsun.load_decode(directory, device="cpu", merge=merge).model.model.layers[0].mlp
        mlp(x).backward(direction)
    assert torch.allclose(hidden[0].grad, hidden[1].grad, atol=1e-5)


def three_parts():
    merged = Merged(qsun.QuantLinear(random_weights(48, 64, 32)), [16, 24, 8])
    return merged, [MergedPart(merged, index) for index in range(3)]


def test_another_tensor_is_another_product():
    merged, parts = three_parts()
    x, y = torch.randn(2, 64), torch.randn(2, 64)
    whole_x, whole_y = merged.layer(x), merged.layer(y)
    assert torch.equal(parts[0](x), whole_x[:, :16])
    assert torch.equal(parts[1](y), whole_y[:, 16:40])
    assert torch.equal(parts[2](x), whole_x[:, 40:])
    assert torch.equal(parts[2](y), whole_y[:, 40:])


def test_nothing_is_kept_after_the_last_part():
    merged, parts = three_parts()
    x = torch.randn(2, 64)
    for part in parts:
        part(x)
    assert merged._kept is None


def test_threads_do_not_mix():
    merged, parts = three_parts()
    wrong = []

    def work():
        for _ in range(200):
            x = torch.randn(1, 64)
            if not torch.equal(torch.cat([part(x) for part in parts], -1), merged.layer(x)):
                wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fused_blocks_change_nothing_on_a_cpu(quantized):
    directory = quantized("llama", torch.bfloat16)
    ids = torch.from_numpy(random_tokens(2, 5))
    plain, fused = (
        qsun.load_decode(directory, device="cpu", merge=True, fuse=fuse).model(ids).logits for fuse in (None, True)
    )
    assert torch.equal(plain, fused)
