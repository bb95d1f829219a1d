"""The gradient of a prefill module: against finite differences, and against the seam written as one forward pass."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import qsun
from qsun.data.examples import TokenExample
from qsun.model.lora import AdapterSettings, fresh_adapter, place_adapter
from qsun.runtime.logits import response_loss
from qsun.runtime.seam import collate, monolithic_hidden, seam_hidden
from qsun.tuning.checkpointing import recomputed
from qsun.tuning.optimizer import Optimizer, learning_rate, used_parameters
from qsun.tuning.processes import Processes
from tests.seam_oracle import seam_reference
from tests.tiny_models import FAMILIES

SHAPES = [(6, 3), (1, 4), (11, 1), (2, 2)]  # tokens of prompt and response


def examples(seed=0):
    r = random.Random(seed)
    return [TokenExample(*(tuple(r.randrange(3, 128) for _ in range(n)) for n in shape)) for shape in SHAPES]


@pytest.fixture
def exact_norm(monkeypatch):
    """transformers computes RMSNorm in float32, which finite differences would see."""

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def double_pair(tiny_model, tied=True):
    """Prefill and decode models in float64, a little apart."""
    directory = tiny_model("llama", tie_word_embeddings=tied)
    prefill, decode = (qsun.load_decode(directory, "cpu", torch.float64).model for _ in range(2))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in prefill.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return prefill, decode


def tuned(model):
    """Require gradients of what the KV depends on."""
    used = used_parameters(model.requires_grad_(True))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in used)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def seam_loss(prefill, decode, batch):
    return response_loss(decode, seam_hidden(prefill, decode, batch), batch.labels)


def test_finite_differences(tiny_model, exact_norm):
    prefill, decode = double_pair(tiny_model)
    parameters, batch = tuned(prefill), collate(examples())
    seam_loss(prefill, decode, batch).backward()
    for name, parameter in parameters.items():
        direction, size = torch.randn_like(parameter), 1e-5
        sides = []
        for sign in (size, -size):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign)
                sides.append(seam_loss(prefill, decode, batch).item())
                parameter.add_(direction, alpha=-sign)
        slope = (sides[0] - sides[1]) / (2 * size)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("tied", [True, False])
def test_one_forward_pass_with_two_sets_of_weights(tied, tiny_model, exact_norm):
    prefill, decode = double_pair(tiny_model, tied)
    parameters = tuned(prefill)
    loss = seam_loss(prefill, decode, collate(examples()))
    loss.backward()
    theirs = {name: p.detach().clone().requires_grad_() for name, p in prefill.named_parameters()}
    expected = torch.zeros((), dtype=torch.float64)
    for example in examples():
        whole = [*example.prompt, *example.response[:-1]]
        logits = seam_reference(theirs, dict(decode.named_parameters()), decode.config, whole, len(example.prompt))
        expected = expected + F.cross_entropy(logits, torch.tensor(example.response), reduction="sum")
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=0)  # RoPE is float32 there
    for name, gradient in zip(
        theirs, torch.autograd.grad(expected, list(theirs.values()), allow_unused=True), strict=True
    ):
        if name in parameters:
            torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert gradient is None or not gradient.any(), f"{name} matters, but is frozen"


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_the_kv_depends_on_is_tuned(family, tiny_model):
    """Oracle: change a parameter, see whether the loss does."""
    directory = tiny_model(family)
    prefill, decode = (qsun.load_decode(directory, "cpu", torch.float32).model for _ in range(2))
    used, batch = used_parameters(prefill.requires_grad_(True)), collate(examples())
    with torch.no_grad():
        before = seam_loss(prefill, decode, batch)
        for name, parameter in prefill.named_parameters():
            kept = parameter.clone()
            parameter.add_(torch.randn_like(parameter))
            assert (seam_loss(prefill, decode, batch) != before).item() == (name in used), name
            parameter.copy_(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_no_gradient(family, tiny_model):
    directory = tiny_model(family)
    prefill, decode = (qsun.load_decode(directory, "cpu", torch.float32).model for _ in range(2))
    parameters, batch = tuned(prefill), collate(examples(1))
    seam_loss(prefill, decode, batch).backward()
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    prefill.zero_grad()
    with recomputed(prefill, decode):
        loss = seam_loss(prefill, decode, batch)
    loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_recomputing_keeps_fewer_activations(tiny_model):
    prefill, decode = (qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model for _ in range(2))
    tuned(prefill)
    batch, kept = collate(examples()), []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            if recompute:
                with recomputed(prefill, decode):
                    seam_loss(prefill, decode, batch)
            else:
                seam_loss(prefill, decode, batch)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_recomputing_leaves_the_last_layers_unused_half_out(tiny_model):
    prefill, decode = (qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model for _ in range(2))
    tuned(prefill)
    ran = []
    for name, module in prefill.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with recomputed(prefill, decode):
        seam_loss(prefill, decode, collate(examples())).backward()
    assert "model.layers.0.mlp" in ran and ran.count("model.layers.1.self_attn.v_proj") == 2
    assert not {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp"} & set(ran)


def test_one_model_on_both_sides_is_conventional_fine_tuning(tiny_model, exact_norm):
    """The gradients of both sides add up to those of the monolithic forward pass."""
    prefill, _ = double_pair(tiny_model)
    decode, whole, batch = copy.deepcopy(prefill), copy.deepcopy(prefill), collate(examples())
    for model in (prefill, decode, whole):
        model.requires_grad_(True)
    seam = seam_loss(prefill, decode, batch)
    full = response_loss(whole, monolithic_hidden(whole, batch), batch.labels)
    torch.testing.assert_close(seam, full, rtol=1e-12, atol=0)
    seam.backward()
    full.backward()
    for ours, theirs, both in zip(prefill.parameters(), decode.parameters(), whole.parameters(), strict=True):
        summed = sum(p.grad for p in (ours, theirs) if p.grad is not None)
        torch.testing.assert_close(summed, both.grad, rtol=1e-9, atol=1e-12)


def test_through_a_quantized_decode_module(tmp_path, tiny_model):
    """The gradient is that of the same decode module with its weights written out."""
    base = tiny_model("llama")
    qsun.quantize(base, tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32))
    decode = qsun.load_decode(tmp_path / "q", "cpu", torch.float32).model
    dense = qsun.load_decode(base, "cpu", torch.float32).model
    for name, module in decode.named_modules():
        if isinstance(module, qsun.QuantLinear):
            dense.get_submodule(name).weight.data.copy_(module.weight)
    found = []
    for other in (decode, dense):
        prefill = qsun.load_decode(base, "cpu", torch.float32).model
        parameters = tuned(prefill)
        seam_loss(prefill, other, collate(examples())).backward()
        found.append({name: p.grad for name, p in parameters.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_only_adapters_that_matter_are_tuned(tiny_model):
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model
    place_adapter(model, fresh_adapter(model, AdapterSettings(3, 6), seed=0))
    names = set(tuned_adapters(model))
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)
    assert {name.split(".")[4] for name in names if ".1." in name} == {"k_proj", "v_proj"}
    assert len(names) == 2 * (7 + 2)


def tuned_adapters(model):
    used = used_parameters(model)
    return [name for name, p in model.named_parameters() if p.requires_grad and name in used]


def test_half_precision_weights_have_float32_masters(tiny_model):
    """Steps far below bfloat16's resolution add up; without masters every one of them would be rounded away."""
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.bfloat16).model
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    before = weight.detach().clone()
    optimizer = Optimizer(model, 0.0, Processes(torch.device("cpu")))
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.take_gradients()
        assert weight.grad is None
        optimizer.step(lr=1e-5, clip=1e9)
    moved = (optimizer.masters["model.layers.0.mlp.up_proj.weight"] - before.float()).mean().item()
    assert moved == pytest.approx(-400e-5, rel=1e-3)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float().mean() - before.float().mean(), torch.tensor(moved), rtol=0.05, atol=0)


def test_gradients_of_passes_add_up_and_are_clipped(tiny_model, monkeypatch):
    monkeypatch.setattr("qsun.tuning.optimizer._PIECE", 200)  # a few rows at a time, and a rest
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.bfloat16).model.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    optimizer = Optimizer(model, 0.0, Processes(torch.device("cpu")))
    master = optimizer.masters["model.layers.0.mlp.up_proj.weight"]
    moment = torch.zeros_like(master)
    for clip in (1e9, 3.0, 1e9):  # the gradients of a step do not reach the next
        passes = [torch.randn_like(weight) for _ in range(3)]
        for weight.grad in passes:
            optimizer.take_gradients()
        total = sum(each.double() for each in passes)
        norm = optimizer.step(lr=1e-3, clip=clip)
        assert norm == pytest.approx(total.norm().item(), rel=1e-6)
        moment = 0.9 * moment + 0.1 * (total * min(1.0, clip / norm)).float()
        torch.testing.assert_close(optimizer.adamw.state[master]["exp_avg"], moment, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0, 0.1, 0.05) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.1 < rates[-1] < 0.102
    assert learning_rate(0, 1, 2.0, 0.0, 0.05) == 2.0
