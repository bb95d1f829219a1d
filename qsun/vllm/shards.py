"""The part of a stored layer that one tensor-parallel rank holds, and how to unpack it. It imports no vLLM.

vLLM cuts stored tensors as they lie on disk: a column-parallel layer along N, a row-parallel one along K. A cut is
exact if it falls between packed words and between groups; all others are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from qsun.config import LayerSpec
from qsun.errors import QsunError
from qsun.model.formats import unpack_layer
from qsun.model.quantized import Quantized

WORD_BITS = 32


@dataclass(frozen=True)
class LayerShard:
    """A layer on one rank.

    Attributes:
        name: of the layer, for errors.
        fmt: gptq, gptq_v2, awq or compressed-tensors.
        spec: bits, group size and symmetry, the same for all parts of a fused layer.
        in_features: of the whole layer; in_shard: of this rank.
        out_shards: rows of each part (q, k, v) on this rank.
    """

    name: str
    fmt: str
    spec: LayerSpec
    in_features: int
    in_shard: int
    out_shards: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return sum(self.out_shards)

    @property
    def row_parallel(self) -> bool:
        return self.in_shard != self.in_features

    @property
    def groups(self) -> int:
        return 1 if self.spec.group_size == -1 else self.in_shard // self.spec.group_size


@dataclass(frozen=True)
class ShardTensor:
    """A stored tensor as a rank holds it, with what vLLM needs to make a parameter.

    input_dim, output_dim: dimensions that row- and column-parallel layers cut; None: every rank holds all of it.
    packed_dim: the one whose values are packed, packed_factor to a word (a fraction at 3 bits).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    input_dim: int | None = None
    output_dim: int | None = None
    packed_dim: int | None = None
    packed_factor: Fraction | None = None


def check_shard(shard: LayerShard) -> None:
    """Raise QsunError if a cut falls inside a packed word or a group."""
    bits, size = shard.spec.bits, shard.spec.group_size
    if shard.row_parallel:
        if size != -1 and shard.in_shard % size:
            raise QsunError(
                f"{shard.name}: tensor parallelism gives a rank {shard.in_shard} of {shard.in_features} inputs, which "
                f"cuts a group of {size}; use fewer ranks, or quantize with a smaller group_size"
            )
        if shard.fmt != "awq" and shard.in_shard * bits % WORD_BITS:
            raise QsunError(
                f"{shard.name}: tensor parallelism gives a rank {shard.in_shard} inputs of {bits} bits, which cuts a "
                "word of 32; use fewer ranks"
            )
    packs_rows = shard.fmt != "compressed-tensors" or not shard.spec.sym
    odd = [rows for rows in shard.out_shards if packs_rows and rows * bits % WORD_BITS]
    if odd:
        raise QsunError(
            f"{shard.name}: a rank's {odd[0]} rows of {bits} bits do not fill words of 32, as format {shard.fmt} packs "
            "them; use fewer ranks, or --format compressed-tensors with --sym"
        )


def shard_tensors(shard: LayerShard, present: Sequence[str]) -> dict[str, ShardTensor]:
    """Return the tensors of a shard by suffix.

    Args:
        present: suffixes that the checkpoint has for the layer; g_idx may be absent.
    Raises:
        QsunError: a cut that is not exact.
    """
    check_shard(shard)
    every = _compressed(shard) if shard.fmt == "compressed-tensors" else _gptq_or_awq(shard)
    return {suffix: tensor for suffix, tensor in every.items() if suffix in present}


def _gptq_or_awq(shard: LayerShard) -> dict[str, ShardTensor]:
    bits, K, N, G = shard.spec.bits, shard.in_shard, shard.out_features, shard.groups
    factor = Fraction(WORD_BITS, bits)
    groups_dim = None if shard.spec.group_size == -1 else 0
    words = torch.int32
    if shard.fmt == "awq":
        qweight = ShardTensor((K, N * bits // WORD_BITS), words, 0, 1, 1, factor)
    else:
        qweight = ShardTensor((K * bits // WORD_BITS, N), words, 0, 1, 0, factor)
    return {
        "qweight": qweight,
        "qzeros": ShardTensor((G, N * bits // WORD_BITS), words, groups_dim, 1, 1, factor),
        "scales": ShardTensor((G, N), torch.float32, groups_dim, 1),
        "g_idx": ShardTensor((K,), torch.int32, 0),
    }


def _compressed(shard: LayerShard) -> dict[str, ShardTensor]:
    bits, K, N, G = shard.spec.bits, shard.in_shard, shard.out_features, shard.groups
    factor = Fraction(WORD_BITS, bits)
    groups_dim = None if shard.spec.group_size == -1 else 1
    words = torch.int32
    return {
        "weight_packed": ShardTensor((N, -(-K * bits // WORD_BITS)), words, 1, 0, 1, factor),
        "weight_scale": ShardTensor((N, G), torch.float32, groups_dim, 0),
        "weight_shape": ShardTensor((2,), torch.int64),
        "weight_zero_point": ShardTensor((N * bits // WORD_BITS, G), words, groups_dim, 0, 0, factor),
    }


def unpack_shard(tensors: Mapping[str, Tensor], shard: LayerShard) -> Quantized:
    """Return the integers of a shard from its loaded tensors.

    Raises:
        QsunError: a tensor that was never loaded, or activation-ordered groups that a cut along K splits.
    """
    scales = tensors["weight_scale" if shard.fmt == "compressed-tensors" else "scales"]
    if not bool(scales.isfinite().all()):
        raise QsunError(f"{shard.name}: its scales were not all loaded; is the checkpoint complete?")
    whole = dict(tensors)
    if shard.fmt == "compressed-tensors":
        whole["weight_shape"] = torch.tensor([shard.out_features, shard.in_shard])
    if "g_idx" in whole and shard.row_parallel:
        order = whole.pop("g_idx")
        size = shard.in_shard // shard.groups
        expected = torch.arange(shard.in_shard, device=order.device, dtype=order.dtype) // size
        if not torch.equal(order - order[0], expected):
            raise QsunError(
                f"{shard.name} has activation-ordered groups (desc_act), which tensor parallelism would split; "
                "use --tensor-parallel-size 1, or quantize without --desc-act"
            )
    return unpack_layer(whole, shard.spec, shard.fmt)
