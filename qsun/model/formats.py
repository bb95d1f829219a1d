"""Tensor layouts on disk: GPTQ v1, AWQ gemm, compressed-tensors. Pure: tensors in, tensors out.

All three store unsigned integers q with w = (q - zero) * scale, packed into int32 words low bits first; they differ in
axis, order and where the zero point goes. K = in_features, N = out_features, G = groups, b = bits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qsun.config import LayerSpec, QuantConfig
from qsun.errors import QsunError
from qsun.model.quantized import Quantized

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column AWQ_ORDER[i] of its eight
_PIECE_ELEMENTS = 1 << 21
SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
}


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack along dim 0 as one stream of bits, 32 to a word; a 3-bit value may straddle two words.

    Args:
        values: (R, C) integers 0 .. 2^bits - 1.
    Returns:
        (ceil(R * bits / 32), C) int32.
    """
    return torch.cat([_pack_piece(piece, bits) for piece in _column_pieces(values)], 1)


def _pack_piece(values: Tensor, bits: int) -> Tensor:
    rows, columns = values.shape
    words = (rows * bits + 31) // 32
    if 32 % bits == 0:
        wide = values.new_zeros(words * (32 // bits), columns, dtype=torch.int32)
        wide[:rows] = values
        shifts = _shifts(bits, values.device)
        return (wide.view(words, -1, columns) << shifts).sum(1, dtype=torch.int32)  # no two share a bit
    packed = torch.zeros(words + 1, columns, dtype=torch.int64, device=values.device)
    starts = torch.arange(rows, device=values.device) * bits
    wide = values.to(torch.int64) << (starts % 32)[:, None]
    packed.index_add_(0, starts // 32, wide & 0xFFFFFFFF)
    packed.index_add_(0, starts // 32 + 1, wide >> 32)
    packed = packed[:words]
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Return where the values of a word start, (32 / bits, 1), if none straddles two words."""
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]


def unpack_rows(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Undo `pack_rows`. Returns (rows, C) uint8."""
    return torch.cat([_unpack_piece(piece, bits, rows) for piece in _column_pieces(packed)], 1)


def _unpack_piece(packed: Tensor, bits: int, rows: int) -> Tensor:
    if 32 % bits == 0:
        values = (packed[:, None] >> _shifts(bits, packed.device)) & (2**bits - 1)
        return values.to(torch.uint8).flatten(0, 1)[:rows]
    words = torch.cat([packed.to(torch.int64) & 0xFFFFFFFF, packed.new_zeros(1, packed.shape[1], dtype=torch.int64)])
    starts = torch.arange(rows, device=packed.device) * bits
    pairs = words[starts // 32] | (words[starts // 32 + 1] << 32)
    return ((pairs >> (starts % 32)[:, None]) & (2**bits - 1)).to(torch.uint8)


def _column_pieces(values: Tensor) -> tuple[Tensor, ...]:
    """Split into pieces of a few million, as the 64-bit intermediates are eight times the integers."""
    return values.split(max(1, _PIECE_ELEMENTS // max(1, values.shape[0])), dim=1)


def pack_layer(weights: Quantized, spec: LayerSpec, fmt: str) -> dict[str, Tensor]:
    """Return the tensors of one layer by suffix. Layouts: docs/formats.md."""
    if fmt == "gptq":
        return _pack_gptq(weights, spec.bits)
    if fmt == "awq":
        return _pack_awq(weights)
    return _pack_compressed(weights, spec)


def unpack_layer(tensors: Mapping[str, Tensor], spec: LayerSpec, fmt: str) -> Quantized:
    """Undo `pack_layer`; `fmt` may also be gptq_v2, whose zero points are stored as they are."""
    if fmt in ("gptq", "gptq_v2"):
        return _unpack_gptq(tensors, spec.bits, offset=1 if fmt == "gptq" else 0)
    if fmt == "awq":
        return _unpack_awq(tensors)
    return _unpack_compressed(tensors, spec)


def stored_shapes(fmt: str, bits: int, shape: tuple[int, int], groups: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a layer by suffix; `fmt` may also be gptq_v2.

    shape: (out_features, in_features).
    """
    (N, K), G = shape, groups
    packed_N, packed_K = (-(-n * bits // 32) for n in shape)
    if fmt == "compressed-tensors":
        packed = {"weight_packed": (N, packed_K), "weight_zero_point": (packed_N, G)}
        return packed | {"weight_scale": (N, G), "weight_shape": (2,), "weight_g_idx": (K,)}
    qweight = (K, packed_N) if fmt == "awq" else (packed_K, N)
    return {"qweight": qweight, "qzeros": (G, packed_N), "scales": (G, N), "g_idx": (K,)}


def _pack_gptq(weights: Quantized, bits: int) -> dict[str, Tensor]:
    """qweight (K*b/32, N), qzeros (G, N*b/32) holding zero - 1, scales fp16 (G, N), g_idx (K,) int32."""
    K, G = weights.q.shape[1], weights.scales.shape[0]
    g_idx = weights.g_idx if weights.g_idx is not None else torch.arange(K, dtype=torch.int32) // (K // G)
    stored = (weights.zeros.to(torch.int64) - 1) & (2**bits - 1)
    return {
        "qweight": pack_rows(weights.q.t(), bits).contiguous(),
        "qzeros": pack_rows(stored.t(), bits).t().contiguous(),
        "scales": weights.scales.to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def _unpack_gptq(tensors: Mapping[str, Tensor], bits: int, offset: int) -> Quantized:
    scales = tensors["scales"].float()
    G, N = scales.shape
    K = tensors["qweight"].shape[0] * 32 // bits
    zeros = unpack_rows(tensors["qzeros"].t(), bits, N).t().to(torch.int16)
    zeros = ((zeros + offset) & (2**bits - 1)).to(torch.uint8)
    q = unpack_rows(tensors["qweight"], bits, K).t().contiguous()
    g_idx = tensors.get("g_idx")
    contiguous = torch.arange(K, dtype=torch.int32) // (K // G)
    if g_idx is not None and torch.equal(g_idx.cpu(), contiguous):
        g_idx = None
    return Quantized(q, scales, zeros.contiguous(), g_idx)


def _pack_awq(weights: Quantized) -> dict[str, Tensor]:
    """qweight (K, N/8) and qzeros (G, N/8) in AWQ_ORDER, scales fp16 (G, N)."""

    def pack(values: Tensor) -> Tensor:
        shuffled = values.reshape(values.shape[0], -1, 8)[..., list(AWQ_ORDER)].reshape(values.shape)
        return pack_rows(shuffled.t(), 4).t().contiguous()

    scales = weights.scales.to(torch.float16).contiguous()
    return {"qweight": pack(weights.q.t()), "qzeros": pack(weights.zeros), "scales": scales}


def _unpack_awq(tensors: Mapping[str, Tensor]) -> Quantized:
    scales = tensors["scales"].float()
    N = scales.shape[1]
    inverse = sorted(range(8), key=AWQ_ORDER.__getitem__)

    def unpack(packed: Tensor) -> Tensor:
        values = unpack_rows(packed.t(), 4, N).t()
        return values.reshape(values.shape[0], -1, 8)[..., inverse].reshape(values.shape)

    return Quantized(unpack(tensors["qweight"]).t().contiguous(), scales, unpack(tensors["qzeros"]).contiguous())


def _pack_compressed(weights: Quantized, spec: LayerSpec) -> dict[str, Tensor]:
    """weight_packed (N, ceil(K*b/32)), weight_scale fp16 (N, G), weight_shape, asym: weight_zero_point (N*b/32, G)."""
    tensors = {
        "weight_packed": pack_rows(weights.q.t(), spec.bits).t().contiguous(),
        "weight_scale": weights.scales.to(torch.float16).t().contiguous(),
        "weight_shape": torch.tensor(weights.q.shape, dtype=torch.int64),
    }
    if not spec.sym:
        tensors["weight_zero_point"] = pack_rows(weights.zeros.t(), spec.bits).contiguous()
    return tensors


def _unpack_compressed(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Quantized:
    if "weight_g_idx" in tensors:
        raise QsunError("compressed-tensors with activation-ordered groups (weight_g_idx) is not supported")
    N, K = (int(n) for n in tensors["weight_shape"])
    scales = tensors["weight_scale"].float().t().contiguous()
    q = unpack_rows(tensors["weight_packed"].t(), spec.bits, K).t().contiguous()
    packed = tensors.get("weight_zero_point")
    if packed is None:
        zeros = torch.full(scales.shape, 2 ** (spec.bits - 1), dtype=torch.uint8, device=scales.device)
    else:
        zeros = unpack_rows(packed, spec.bits, N).t().contiguous()
    return Quantized(q, scales, zeros)


def check_format(config: QuantConfig, layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise QsunError for what the target format cannot hold, naming one that can.

    Args:
        layers: (out_features, in_features) of each linear layer by full name.
    """
    mixed = sorted({s.bits for s in map(config.spec_for, layers) if s.quantized and s.bits != config.bits})
    if config.desc_act and config.format != "gptq":
        raise QsunError(
            f"format {config.format} cannot hold desc_act groups; use --format gptq, or leave --desc-act out"
        )
    if config.format == "awq":
        if config.bits != 4 or mixed:
            raise QsunError(
                f"format awq holds 4-bit layers only, not {mixed or config.bits}; use gptq or compressed-tensors"
            )
        if config.lm_head:
            raise QsunError("format awq cannot hold a quantized lm_head; use --format gptq")
        sizes = {s.group_size for s in map(config.spec_for, layers) if s.quantized} - {config.group_size}
        if sizes:
            raise QsunError(
                f"format awq has one group_size for all layers, {config.group_size}, not also {min(sizes)}; "
                "use gptq or compressed-tensors"
            )
    for name, shape in layers.items():
        _check_layer(name, shape, config.spec_for(name), config.format)


def _check_layer(name: str, shape: tuple[int, int], spec: LayerSpec, fmt: str) -> None:
    N, K = shape
    if not spec.quantized:
        return
    if spec.group_size != -1 and K % spec.group_size:
        fits = [str(g) for g in (128, 64, 32) if K % g == 0]
        raise QsunError(
            f"group_size {spec.group_size} does not divide in_features {K} of {name}; use {' or '.join([*fits, '-1'])}"
        )
    packed = {"gptq": (K, N), "awq": (N,), "compressed-tensors": () if spec.sym else (N,)}[fmt]
    step = 8 if fmt == "awq" else 32
    odd = [n for n in packed if n % step]
    if odd:
        raise QsunError(
            f"format {fmt} needs dimensions that are multiples of {step}, but {name} is {N} x {K}; "
            f"use --format compressed-tensors with --sym, or --override '{name}=skip'"
        )
