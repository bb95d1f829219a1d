"""Our product with packed weights and its alternatives behind one signature, those that are installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qsun.model.quantized import Quantized
from qsun.runtime.quant_linear import QuantLinear

Product = Callable[[Tensor], Tensor]
Builder = Callable[[Quantized, int, torch.dtype, int], Callable[[], Product]]


def ours(weights: Quantized, group_size: int, dtype: torch.dtype, bits: int) -> Callable[[], Product]:
    """Build QuantLinear as load_decode does."""
    return lambda: QuantLinear(weights, None, bits, dtype, keep_dense=weights.q.device.type == "cpu")


def full_precision(weights: Quantized, group_size: int, dtype: torch.dtype, bits: int) -> Callable[[], Product]:
    """Build F.linear with the dequantized weights: the full-precision decode module."""
    dense = weights.dequantize().to(dtype)

    def build() -> Product:
        weight = dense.clone()
        return lambda x: linear(x, weight)

    return build


def tinygemm(weights: Quantized, group_size: int, dtype: torch.dtype, bits: int) -> Callable[[], Product]:
    """Build torch.ops.aten._weight_int4pack_mm: bfloat16 on CUDA only. It adds (8 - z) * scale to (q - 8) * scale."""
    fits = dtype == torch.bfloat16 and weights.q.device.type == "cuda" and group_size in (32, 64, 128, 256)
    if not fits or bits != 4:
        raise NotImplementedError("4 bits, bfloat16 on CUDA, groups of 32 to 256")
    nibbles = (weights.q[:, ::2] << 4) | weights.q[:, 1::2]
    pairs = torch.stack([weights.scales, (8 - weights.zeros.float()) * weights.scales], -1).to(dtype).contiguous()

    def build() -> Product:
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
        held = pairs.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group_size, held)

    return build


def gemlite(weights: Quantized, group_size: int, dtype: torch.dtype, bits: int) -> Callable[[], Product]:
    """Build gemlite's GemLiteLinear, packed as its helper packs HQQ weights."""
    from gemlite.core import DType, GemLiteLinear

    kind = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    N, K = weights.q.shape
    size = K if group_size == -1 else group_size
    scales, zeros = (t.t().contiguous().to(dtype) for t in (weights.scales, weights.zeros))

    def build() -> Product:
        layer = GemLiteLinear(bits, size, K, N, input_dtype=kind, output_dtype=kind)
        layer.pack(weights.q.clone(), scales, zeros, None)
        return layer.forward

    return build


def humming(weights: Quantized, group_size: int, dtype: torch.dtype, bits: int) -> Callable[[], Product]:
    """Build humming-kernels' HummingLayer, which quantizes the dense weights itself (symmetric)."""
    from humming.layer import HummingLayer

    N, K = weights.q.shape
    config: dict[str, Any] = {"dtype": f"int{bits}"} | ({} if group_size == -1 else {"group_size": group_size})
    dense = weights.dequantize().to(dtype)

    def build() -> Product:
        layer: Any = HummingLayer(shape_n=N, shape_k=K, weight_config=config, torch_dtype=dtype).cuda()
        layer.load_from_unquantized(dense)
        layer.transform()
        return layer

    return build


def marlin(weights: Quantized, group_size: int, dtype: torch.dtype, bits: int) -> Callable[[], Product]:
    """Build vLLM's Marlin product, symmetric only, as its linear kernel for GPTQ does."""
    if bits != 4 or not bool((weights.zeros == 8).all()):
        raise NotImplementedError("4 bits and zero points of 8")
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    N, K = weights.q.shape
    from qsun.model.formats import pack_rows  # formats needs pydantic, and `make gpu` runs without it

    words = pack_rows(weights.q.t(), 4)
    scales, none = weights.scales.to(dtype), utils.marlin_make_empty_g_idx(words.device)
    fixed = {"weight_zp": none, "g_idx": none, "g_idx_sort_indices": none, "wtype": scalar_types.uint4b8}
    fixed |= {"output_size_per_partition": N, "input_size_per_partition": K, "is_k_full": True}

    def build() -> Product:
        held = {
            "weight": ops.gptq_marlin_repack(words, none, K, N, 4),
            "weight_scale": utils.marlin_permute_scales(scales, K, N, group_size),
            "workspace": utils.marlin_make_workspace_new(words.device),
        }
        return lambda x: utils.apply_gptq_marlin_linear(input=x, **held, **fixed)

    return build


CPU_CONTENDERS: dict[str, Builder] = {"bf16": full_precision, "ours": ours}
CUDA_CONTENDERS: dict[str, Builder] = {
    **CPU_CONTENDERS,
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "humming": humming,
    "marlin": marlin,
}
