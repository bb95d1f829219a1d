"""Layouts against independent bit-by-bit packers written from DESIGN.md's description, and round trips."""

import pytest
import torch

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError
from qsun.model.formats import AWQ_ORDER, check_format, pack_layer, pack_rows, unpack_layer, unpack_rows
from qsun.model.quantized import Quantized


def random_layer(N, K, bits, group_size, sym, act_order=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    G = 1 if group_size == -1 else K // group_size
    zeros = torch.full((G, N), 2 ** (bits - 1)) if sym else torch.randint(1, 2**bits, (G, N), generator=g)
    g_idx = torch.randperm(K, generator=g).div(K // G, rounding_mode="floor").to(torch.int32) if act_order else None
    q = torch.randint(0, 2**bits, (N, K), generator=g, dtype=torch.uint8)
    return Quantized(q, torch.randn(G, N, generator=g).half().float(), zeros.to(torch.uint8), g_idx)


def bit(words, position):
    """Bit of a stream of int32 words, low bits first."""
    return (int(words[position // 32]) >> (position % 32)) & 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 3), (33, 2), (96, 5), (100, 1)])
def test_packing_is_one_stream_of_bits(bits, rows, columns):
    values = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(rows))
    packed = pack_rows(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == ((rows * bits + 31) // 32, columns)
    for column in range(columns):
        for row in range(rows):
            read = sum(bit(packed[:, column], row * bits + b) << b for b in range(bits))
            assert read == values[row, column]
    assert torch.equal(unpack_rows(packed, bits, rows), values.to(torch.uint8))


def test_packing_many_columns_in_pieces():
    values = torch.randint(0, 8, (4096, 1500), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack_rows(values, 3)
    assert torch.equal(packed[:, 700:701], pack_rows(values[:, 700:701], 3))
    assert torch.equal(unpack_rows(packed, 3, 4096), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_layout(bits, group_size, sym):
    layer = random_layer(64, 128, bits, group_size, sym, act_order=group_size == 32)
    spec = LayerSpec(bits, group_size, sym)
    stored = pack_layer(layer, spec, "gptq")
    K, N, G = 128, 64, layer.scales.shape[0]
    assert stored["qweight"].shape == (K * bits // 32, N)
    assert stored["qzeros"].shape == (G, N * bits // 32)
    assert stored["scales"].dtype == torch.float16
    for k, n in [(0, 0), (10, 3), (11, 63), (127, 31)]:  # 3-bit values 10 and 21 straddle words
        assert sum(bit(stored["qweight"][:, n], k * bits + b) << b for b in range(bits)) == layer.q[n, k]
        group = int(stored["g_idx"][k])
        zero = sum(bit(stored["qzeros"][group], n * bits + b) << b for b in range(bits)) + 1
        assert zero == layer.zeros[group, n]
    read = unpack_layer(stored, spec, "gptq")
    assert torch.equal(read.dequantize(), layer.dequantize())
    shifted = {**stored, "qzeros": pack_rows(layer.zeros.t(), bits).t()}
    assert torch.equal(unpack_layer(shifted, spec, "gptq_v2").dequantize(), layer.dequantize())


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_awq_layout(group_size, sym):
    layer, spec = random_layer(40, 128, 4, group_size, sym), LayerSpec(4, group_size, sym)
    stored = pack_layer(layer, spec, "awq")
    assert stored["qweight"].shape == (128, 5)
    for k, word, nibble in [(0, 0, 0), (5, 3, 1), (127, 4, 7)]:
        column = 8 * word + AWQ_ORDER[nibble]
        assert (int(stored["qweight"][k, word]) >> (4 * nibble)) & 15 == layer.q[column, k]
        assert (int(stored["qzeros"][0, word]) >> (4 * nibble)) & 15 == layer.zeros[0, column]
    assert torch.equal(unpack_layer(stored, spec, "awq").dequantize(), layer.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("N", "K"), [(32, 64), (64, 96)])
def test_compressed_layout(bits, sym, N, K):
    layer, spec = random_layer(N, K, bits, 32, sym), LayerSpec(bits, 32, sym)
    stored = pack_layer(layer, spec, "compressed-tensors")
    assert stored["weight_packed"].shape == (N, (K * bits + 31) // 32)
    assert stored["weight_shape"].tolist() == [N, K]
    assert ("weight_zero_point" in stored) is not sym
    assert sum(bit(stored["weight_packed"][7], 33 * bits + b) << b for b in range(bits)) == layer.q[7, 33]
    assert torch.equal(unpack_layer(stored, spec, "compressed-tensors").dequantize(), layer.dequantize())


@pytest.mark.parametrize("fmt", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("sym", [True, False])
def test_what_is_read_stays_on_the_device_of_what_was_stored(fmt, sym):
    """On a GPU nothing may be left on the CPU; the meta device shows it on any machine."""
    spec = LayerSpec(4, 32, sym)
    stored = pack_layer(random_layer(32, 64, 4, 32, sym), spec, fmt)
    shape = {name: tensor for name, tensor in stored.items() if name == "weight_shape"}  # two numbers, which are read
    stored.pop("g_idx", None)
    read = unpack_layer({name: tensor.to("meta") for name, tensor in stored.items()} | shape, spec, fmt)
    assert {tensor.device.type for tensor in (read.q, read.scales, read.zeros)} == {"meta"}
    assert read.scales.shape == read.zeros.shape == (2, 32)


@pytest.mark.parametrize(
    ("settings", "shape", "says"),
    [
        ({"format": "awq", "bits": 3}, (64, 128), "4-bit layers only"),
        ({"format": "awq", "overrides": ("mlp=bits:8",)}, (64, 128), "4-bit layers only"),
        ({"format": "awq", "overrides": ("mlp=group_size:32",)}, (64, 128), "one group_size for all layers"),
        ({"format": "awq", "lm_head": True}, (64, 128), "lm_head"),
        ({"format": "awq", "desc_act": True}, (64, 128), "desc_act"),
        ({"format": "compressed-tensors", "desc_act": True}, (64, 128), "--format gptq"),
        ({"group_size": 128}, (64, 192), "use 64 or 32 or -1"),
        ({"group_size": 32}, (64, 100), "use -1"),
        ({"group_size": -1}, (40, 128), "multiples of 32"),
        ({"format": "awq", "group_size": -1}, (44, 128), "multiples of 8"),
        ({"format": "compressed-tensors", "sym": False, "group_size": -1}, (40, 128), "multiples of 32"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(settings, shape, says):
    with pytest.raises(QsunError, match=says):
        check_format(QuantConfig(**settings), {"model.layers.0.mlp.up_proj": shape})


def test_skipped_layers_may_have_any_shape():
    check_format(QuantConfig(overrides=("up_proj=skip",)), {"model.layers.0.mlp.up_proj": (41, 97)})
