"""KV in fp8: what is kept and given back, in every kind of cache, and what a model's answers become."""

import pytest
import torch

import qsun
from qsun.engine.config import EngineConfig
from qsun.engine.decode.decode_step import DecodeStep
from qsun.engine.decode.fixed_slots import FixedSlots
from qsun.engine.decode.slot_cache import SlotCache
from qsun.engine.engine import Engine
from qsun.errors import QsunError
from qsun.model.architectures import kv_shape
from qsun.runtime.kv_cache import decode_kv, encode_kv, kv_bytes_per_token
from tests.engine.decode.test_fixed_slots import Model
from tests.engine.decode.test_slot_cache import CONFIG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_within_half_a_step(dtype):
    x = (torch.randn(4, 3, 5, 64) * 2.0 ** torch.randint(-12, 9, (4, 3, 5, 1))).to(dtype)
    x[0, 0, 0] = 0
    q, scales = encode_kv(x)
    assert (q.dtype, scales.dtype, scales.shape) == (torch.uint8, torch.float32, (4, 3, 5, 1))
    back = decode_kv(q, scales, torch.float64)
    exact, largest = x.double(), x.double().abs().amax(-1, keepdim=True)
    half = torch.maximum(exact.abs() / 16, largest / 448 / 1024)
    assert ((back - exact).abs() <= 1.001 * half).all()
    assert torch.equal(decode_kv(*encode_kv(back.float()), torch.float32), back.float())  # nothing is lost again


def test_what_is_not_finite_stays_so():
    x = torch.randn(2, 64)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    assert decode_kv(*encode_kv(x), torch.float32).isnan().any(-1).all()


def test_bytes():
    assert kv_bytes_per_token(CONFIG, torch.bfloat16, "fp8") == 3 * 2 * 2 * (8 + 4)
    wide = type(CONFIG)(**{**vars(CONFIG), "head_dim": 128})
    assert kv_bytes_per_token(wide, torch.bfloat16, "fp8") / kv_bytes_per_token(wide, torch.bfloat16) < 0.52


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_come_grow_and_go(fixed):
    cache = FixedSlots(Model(), 4000, "fp8") if fixed else SlotCache(CONFIG, torch.zeros(1), 4000, kv_dtype="fp8")
    drawn = [[(torch.randn(2, n, 8), torch.randn(2, n, 8)) for _ in range(3)] for n in (5, 40, 17)]
    for layers, need in zip(drawn, (20, 300, 700), strict=True):
        cache.place(layers, layers[0][0].shape[1], need)
    cache.start((3, 41))
    new = torch.randn(3, 2, 1, 8)
    keys, values = zip(*(cache.update(new, -new, layer) for layer in range(3)), strict=True)
    cache.advance()
    cache.release(0)  # the last row takes its place
    expected = [torch.cat([drawn[row][1][0], new[row]], 1) for row in (2, 1)]
    cache.reserve([1500])
    for row, wanted in enumerate(expected):
        kept = decode_kv(cache.buffers[1][0][row], cache.buffers[1][2][row], torch.float32)[:, : wanted.shape[1]]
        assert torch.equal(kept, decode_kv(*encode_kv(wanted), torch.float32))
    assert torch.equal(keys[1][2, :, 17:18], decode_kv(*encode_kv(new[2]), torch.float32))
    assert torch.equal(values[1], -decode_kv(*encode_kv(-values[1]), torch.float32))


def test_a_step_sees_the_rounded_keys_and_values(tiny_model):
    """The same logits as a plain cache that holds what fp8 rounds its contents to."""
    model = qsun.load_decode(tiny_model("llama"), "cpu", torch.float32).model
    layers, heads, width = kv_shape(model.config)
    drawn = [(torch.randn(heads, 9, width), torch.randn(heads, 9, width)) for _ in range(layers)]
    rounded = [tuple(decode_kv(*encode_kv(x), torch.float32) for x in layer) for layer in drawn]
    logits = []
    for kind, content in (("fp8", drawn), ("auto", rounded), ("auto", drawn)):
        cache = SlotCache(model.config, model.model.embed_tokens.weight, 64, kv_dtype=kind)
        cache.place(content, 9, 20)
        logits.append(DecodeStep(model, cache)([[7]]))
    apart = (logits[0] - logits[1]).norm()  # the new token's own keys and values are rounded in the first alone
    assert 0 < apart < 0.02 * logits[1].norm()
    assert apart < (logits[0] - logits[2]).norm() < 0.1 * logits[2].norm()


def test_an_engine_has_room_for_more(make_engine, decode):
    plain, small = (make_engine(kv_tokens=1000, kv_dtype=kind) for kind in ("auto", "fp8"))
    assert small.budget_tokens == int(1000 * 4 * 16 / (16 + 4))
    with pytest.raises(QsunError, match="kv_dtype"):
        Engine(decode, EngineConfig(kv_dtype="int4"))
    assert plain.budget_tokens == 1000
