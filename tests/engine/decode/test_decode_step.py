"""A decode step that can be captured in a CUDA graph: no op of it reads a tensor's value, and no shape changes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import sdpa_attention

import qsun
from qsun.engine.decode.decode_step import DecodeStep
from qsun.engine.decode.fixed_slots import FixedSlots
from qsun.engine.decode.slot_cache import SlotCache
from qsun.model.architectures import kv_shape
from qsun.runtime.seam import goes_unmasked, seam_masks
from tests.tiny_models import FAMILIES

# What would wait for the device (a capture forbids it), or bring new data from the host.
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique_dim",
    "_unique2",
    "lift_fresh",
}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shapes = [
            tuple(t.shape) for t in (result if isinstance(result, (tuple, list)) else [result]) if hasattr(t, "shape")
        ]
        self.calls.append((func._schema.name.removeprefix("aten::"), shapes))
        return result


def step_of(model, static, lengths=(5, 2)):
    """A step over rows of random keys and values; static ones have room for more rows than there are."""
    weight = model.model.embed_tokens.weight
    cache = FixedSlots(model, 4 * 256) if static else SlotCache(model.config, weight, 4 * 64)
    cache.reserve([64] * len(lengths))
    torch.manual_seed(0)
    layers, heads, width = kv_shape(model.config)
    for length in lengths:
        drawn = [(torch.randn(heads, length, width), torch.randn(heads, length, width)) for _ in range(layers)]
        cache.place(drawn, length, 64)
    return DecodeStep(model, cache)


def recorded(step, tokens):
    with Recorder() as recorder:
        logits = step(tokens).clone()
    return recorder.calls, logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_is_the_same_ops_on_the_same_shapes(family, tiny_model):
    model = qsun.load_decode(tiny_model(family), "cpu", torch.float32).model
    static, growing = step_of(model, True), step_of(model, False)
    runs = []
    for tokens in ([[7], [8]], [[9], [10]], [[11], [12]]):
        calls, logits = recorded(static, tokens)
        runs.append(calls)
        torch.testing.assert_close(logits, growing(tokens), rtol=1e-5, atol=1e-5)
    assert runs[0] == runs[1] == runs[2]
    scalar = ("lift_fresh", [()])  # a capture takes it as a constant; transformers 5.0 has one in Gemma 2
    own_tokens = ("lift_fresh", [(2, 1)])
    assert [call for call in runs[0] if call[0] in READS and call != scalar] == [own_tokens]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_length_need_no_mask(family, tiny_model, monkeypatch):
    """Until a sliding window (7 in some families) hides something; eager attention keeps its mask."""
    model = qsun.load_decode(tiny_model(family), "cpu", torch.float32).model
    static, growing = step_of(model, True, (5, 5)), step_of(model, False, (5, 5))
    asked = []
    monkeypatch.setattr("qsun.engine.decode.decode_step.seam_masks", lambda *a: asked.append(a[-1]) or seam_masks(*a))
    for tokens in ([[7], [8]], [[9], [10]], [[11], [12]], [[13], [14]]):
        logits = growing(tokens)
        torch.testing.assert_close(logits, static(tokens), rtol=1e-5, atol=1e-5)
    windowed = family in ("mistral", "gemma3_text")
    assert [length for length in asked if length < 64] == (
        [6, 7, 8, 9] if family == "gemma2" else [7, 8, 9][: 3 * windowed]
    )


def test_masks_go_once_all_rows_have_one_length(tiny_model, monkeypatch):
    step = step_of(qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model, False)
    asked = []
    monkeypatch.setattr("qsun.engine.decode.decode_step.seam_masks", lambda *a: asked.append(a[-1]) or seam_masks(*a))
    step([[7], [8]])
    step.cache.release(0)
    step([[9]])
    assert asked == [6]


def test_rows_that_are_not_in_use_change_nothing(tiny_model):
    """A static step of 3 rows computes with 4; the fourth writes where no row reads."""
    step = step_of(qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model, True, (5, 2, 7))
    plain = step_of(step.model, False, (5, 2, 7))
    for tokens in ([[7], [8], [9]], [[10], [11], [12]]):
        torch.testing.assert_close(step(tokens), plain(tokens), rtol=1e-5, atol=1e-5)
    assert step.cache.view == (4, 128)


def test_the_recorder_sees_a_step_that_reads():
    with Recorder() as recorder:
        torch.arange(3).max().item()
        torch.arange(3).nonzero()
    assert {name for name, _ in recorder.calls} & READS == {"_local_scalar_dense", "nonzero"}


def test_a_quantized_decode_module(tiny_model, tmp_path):
    qsun.quantize(tiny_model("llama"), tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32))
    decode = qsun.load_decode(tmp_path / "q", "cpu", torch.float32, keep_dense=False)  # no copy made on the way
    step = step_of(decode.model, True)
    first, second = recorded(step, [[7], [8]])[0], recorded(step, [[9], [10]])[0]
    assert first == second
    assert [name for name, _ in first if name in READS] == ["lift_fresh"]


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_where_attention_is_faster_with_one(amx, dtype, tiny_model, monkeypatch):
    """Grouped heads in two bytes on a CPU without AMX; the tokens are the same either way."""
    if not hasattr(sdpa_attention, "pack_gqa"):
        pytest.skip("this transformers does not pack the heads of a group")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    model = qsun.load_decode(tiny_model("llama"), "cpu", dtype).model
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert goes_unmasked(model, 8) == (amx or dtype == torch.float32)
    logits = []
    for chosen in (True, False):
        monkeypatch.setattr("qsun.engine.decode.decode_step.goes_unmasked", lambda *_, chosen=chosen: chosen)
        logits.append(step_of(model, False, (5, 5))([[7], [8]]).float())
    torch.testing.assert_close(*logits, rtol=2e-2, atol=2e-2)


def test_heads_of_their_own_need_no_mask_in_any_type(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.bfloat16).model
    model.config.num_key_value_heads = model.config.num_attention_heads
    assert goes_unmasked(model, 8)
