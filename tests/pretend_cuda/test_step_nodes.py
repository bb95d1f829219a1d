"""The nodes of a whole captured decode step: at most so many around its layers, and none that a fused step ignores."""

from functools import partial

import pytest
import torch

import qsun
from qsun.engine.decode import decode_step
from qsun.kernels import packed_cuda
from qsun.runtime.fused_block import FusedBlock, FusedNorm
from qsun.runtime.seam import unread_masks
from tests.gpu import fused_steps

PROMPTS = [[5, 6, 7], [9], list(range(3, 40))]
# Embedding, head, the copy of the logits, the last norm, and nine for the cosines and sines of the rotation.
AROUND = 13


@pytest.fixture
def quantized(tiny_model, tmp_path):
    def make(family="llama", layers=2, **changes):
        directory, out = tiny_model(family, head_dim=64, num_hidden_layers=layers, **changes), tmp_path / str(layers)
        qsun.quantize(directory, out, qsun.QuantConfig(method="rtn", group_size=32, dtype="bfloat16"))
        return out

    return make


def generate(directory, dtype=torch.bfloat16, device="cuda", **settings):
    decode = qsun.load_decode(directory, device, dtype)
    prefill = qsun.PrefillModule(decode.model, decode.directory)
    return decode.model, qsun.generate(prefill, decode, PROMPTS, max_new_tokens=4, eos=(), **settings)


@pytest.mark.parametrize(("family", "kv_dtype"), [("llama", "auto"), ("qwen3", "fp8"), ("mistral", "auto")])
def test_nodes_of_a_step(quantized, pretend_cuda, family, kv_dtype):
    steps = []
    for layers in (1, 2):
        pretend_cuda.clear()
        generate(quantized(family, layers), kv_dtype=kv_dtype)
        assert not pretend_cuda.graphs[-1].missed
        steps.append(pretend_cuda.graphs[-1].kernels)
    layer = steps[1] - steps[0]
    around = steps[0] - layer
    assert sum(layer.values()) <= 8, layer
    assert sum(around.values()) <= AROUND, around
    assert around["triton::rms_norm_rows"] == 1


@pytest.mark.parametrize(
    ("family", "bits", "kv_dtype"),
    [("llama", 4, "fp8"), ("llama", 2, "auto"), ("llama", None, "fp8"), ("gemma2", 4, "fp8")],
)
def test_what_a_gpu_is_asked_to_compute(pretend_cuda, family, bits, kv_dtype):
    """tests/gpu/test_step.py, whose own device `make gpu` needs."""
    fused_steps.check(family, bits, kv_dtype)


def test_a_step_of_other_blocks_has_its_masks(quantized, pretend_cuda, monkeypatch):
    """One block that is not fused is enough."""
    directory, fuse = quantized(), decode_step.all_fused

    def but_one(model):
        model.model.layers[1] = model.model.layers[1].block
        return fuse(model)

    lent = []
    monkeypatch.setattr(decode_step, "unread_masks", lambda model: lent.append(unread_masks(model)) or lent[-1])
    generate(directory)
    assert lent and all(not mask.numel() for mask in lent)
    lent.clear()
    monkeypatch.setattr(decode_step, "all_fused", but_one)
    generate(directory)
    assert not lent


def test_float32_takes_the_blocks_themselves(quantized, pretend_cuda):
    """The kernels compute in 16 bits; a float32 module has the tokens of a CPU."""
    directory = quantized()
    assert packed_cuda.available(torch.device("cuda", 0))  # which launches a kernel
    pretend_cuda.launches.clear()
    model, answers = generate(directory, torch.float32)
    assert all(isinstance(block, FusedBlock) for block in model.model.layers)
    assert isinstance(model.model.norm, FusedNorm)
    launched = {launch["kernel"] for launch in pretend_cuda.launches}
    assert not launched & {"split_attention", "rotate_and_store", "rms_norm_rows"}
    assert answers == generate(directory, torch.float32, "cpu")[1]


def test_fp8_is_refused_where_the_gpu_has_no_e4m3(quantized, pretend_cuda, cli, monkeypatch):
    directory = quantized()
    run = partial(cli, "generate", directory, "1 2", "--kv-dtype", "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    refused = "kv_dtype fp8 needs compute capability 8.9, and cuda has 8.6; use auto"
    with pytest.raises(qsun.QsunError, match=r"needs compute capability 8\.9, and cuda:0 has 8\.6"):
        generate(directory, kv_dtype="fp8")
    monkeypatch.setattr("qsun.runtime.decode_module.load_decode", lambda *_, **__: pytest.fail("it was loaded"))
    for answer in (run(), cli("serve", "--decode", directory, "--prefill", f"m={directory}", "--kv-dtype", "fp8")):
        assert answer.code == 2
        assert refused in answer.err
