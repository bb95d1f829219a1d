"""Shards of stored layers: a rank's cut of the packed tensors unpacks to the same slice of the integers.

`loaded` does what vLLM's parameter classes do with a ShardTensor; tests/oracles runs the classes themselves.
"""

import pytest
import torch

from qsun.config import LayerSpec
from qsun.errors import QsunError
from qsun.model.formats import pack_layer
from qsun.model.quantized import Quantized
from qsun.vllm.shards import LayerShard, shard_tensors, unpack_shard

K = 256
PARTS = (128, 64, 64)  # rows of q, k and v
LAYOUTS = [
    *(("gptq", bits, size, True) for bits in (2, 3, 4, 8) for size in (32, 128, -1)),
    ("gptq", 4, 64, False),
    ("gptq", 3, 32, False),
    ("awq", 4, 32, False),
    ("awq", 4, -1, False),
    *(("compressed-tensors", bits, 64, sym) for bits in (2, 3, 4, 8) for sym in (True, False)),
    ("compressed-tensors", 4, -1, True),
]


def stored_layer(rows, fmt, spec, seed=0):
    """Random integers of a layer and the tensors that hold them."""
    random = torch.Generator().manual_seed(seed)
    groups = 1 if spec.group_size == -1 else K // spec.group_size
    q = torch.randint(0, 2**spec.bits, (rows, K), generator=random, dtype=torch.uint8)
    scales = (torch.rand(groups, rows, generator=random) + 0.1).half().float()
    zeros = torch.full((groups, rows), 2 ** (spec.bits - 1), dtype=torch.uint8)
    if not spec.sym:
        zeros = torch.randint(1, 2**spec.bits, zeros.shape, generator=random, dtype=torch.uint8)
    weights = Quantized(q, scales, zeros)
    return weights, pack_layer(weights, spec, fmt)


def loaded(shard, parts, rank):
    """A rank's tensors from those of the parts of a layer: cut by position, joined along the output dimension."""
    tensors = {}
    for suffix, place in shard_tensors(shard, list(parts[0])).items():
        pieces = []
        for part, rows in zip(parts, shard.out_shards, strict=True):
            piece = part[suffix]
            if place.input_dim is not None and shard.row_parallel:
                size = place.shape[place.input_dim]
                piece = piece.narrow(place.input_dim, rank * size, size)
            if place.output_dim is not None and not shard.row_parallel:
                size = rows / place.packed_factor if place.packed_dim == place.output_dim else rows
                assert int(size) == size
                piece = piece.narrow(place.output_dim, rank * int(size), int(size))
            pieces.append(piece)
        whole = pieces[0] if place.output_dim is None else torch.cat(pieces, place.output_dim)
        assert tuple(whole.shape) == place.shape
        tensors[suffix] = whole.to(place.dtype)
    return tensors


def assert_same(a, b):
    assert torch.equal(a.q, b.q)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.zeros, b.zeros)
    assert a.g_idx is None


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("fmt", "bits", "size", "sym"), LAYOUTS)
def test_column_parallel_fused_parts(fmt, bits, size, sym, ranks):
    spec = LayerSpec(bits, size, sym)
    layers = [stored_layer(rows, fmt, spec, seed) for seed, rows in enumerate(PARTS)]
    shard = LayerShard("qkv_proj", fmt, spec, K, K, tuple(rows // ranks for rows in PARTS))
    for rank in range(ranks):
        weights = unpack_shard(loaded(shard, [tensors for _, tensors in layers], rank), shard)
        cuts = [slice(rank * rows // ranks, (rank + 1) * rows // ranks) for rows in PARTS]
        expected = Quantized(
            torch.cat([full.q[cut] for (full, _), cut in zip(layers, cuts, strict=True)]),
            torch.cat([full.scales[:, cut] for (full, _), cut in zip(layers, cuts, strict=True)], 1),
            torch.cat([full.zeros[:, cut] for (full, _), cut in zip(layers, cuts, strict=True)], 1),
        )
        assert_same(weights, expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("fmt", "bits", "size", "sym"), LAYOUTS)
def test_row_parallel(fmt, bits, size, sym, ranks):
    spec = LayerSpec(bits, size, sym)
    full, tensors = stored_layer(64, fmt, spec)
    inputs, groups = K // ranks, full.scales.shape[0]
    shard = LayerShard("down_proj", fmt, spec, K, inputs, (64,))
    for rank in range(ranks):
        weights = unpack_shard(loaded(shard, [tensors], rank), shard)
        held = slice(None) if size == -1 else slice(rank * groups // ranks, (rank + 1) * groups // ranks)
        expected = Quantized(full.q[:, rank * inputs : (rank + 1) * inputs], full.scales[held], full.zeros[held])
        assert_same(weights, expected)


def test_activation_order_is_kept_on_one_rank_and_refused_on_two():
    spec = LayerSpec(4, 64, True)
    full, _ = stored_layer(64, "gptq", spec)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3)).to(torch.int32) // 64
    tensors = pack_layer(full._replace(g_idx=order), spec, "gptq")
    whole = LayerShard("down_proj", "gptq", spec, K, K, (64,))
    assert torch.equal(unpack_shard(loaded(whole, [tensors], 0), whole).g_idx, order)
    half = LayerShard("down_proj", "gptq", spec, K, K // 2, (64,))
    with pytest.raises(QsunError, match=r"^down_proj has activation-ordered groups \(desc_act\)"):
        unpack_shard(loaded(half, [tensors], 0), half)


def test_a_tensor_that_no_file_held():
    spec = LayerSpec(4, 64, True)
    shard = LayerShard("o_proj", "awq", spec, K, K, (64,))
    _, tensors = stored_layer(64, "awq", spec)
    tensors["scales"] = torch.full_like(tensors["scales"], float("nan"))
    with pytest.raises(QsunError, match=r"^o_proj: its scales were not all loaded"):
        unpack_shard(tensors, shard)


@pytest.mark.parametrize(
    ("fmt", "spec", "inputs", "rows", "message"),
    [
        ("gptq", LayerSpec(4, 128, True), 64, (64,), "gives a rank 64 of 256 inputs, which cuts a group of 128"),
        ("gptq", LayerSpec(3, -1, True), 16, (64,), "a rank 16 inputs of 3 bits, which cuts a word"),
        ("gptq", LayerSpec(3, 32, True), 256, (48,), "a rank's 48 rows of 3 bits do not fill words"),
        ("awq", LayerSpec(4, 32, False), 256, (64, 12), "a rank's 12 rows of 4 bits do not fill words"),
        ("compressed-tensors", LayerSpec(2, 32, False), 256, (8,), "a rank's 8 rows of 2 bits do not fill words"),
    ],
)
def test_cuts_that_are_not_exact_are_refused(fmt, spec, inputs, rows, message):
    with pytest.raises(QsunError, match=message):
        shard_tensors(LayerShard("layer", fmt, spec, K, inputs, rows), ["qweight"])


def test_symmetric_compressed_tensors_take_any_rows():
    shard = LayerShard("layer", "compressed-tensors", LayerSpec(2, 32, True), K, K, (5,))
    assert shard_tensors(shard, ["weight_packed"])["weight_packed"].shape == (5, 16)
