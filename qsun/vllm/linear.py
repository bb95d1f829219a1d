"""A vLLM linear layer on our kernels: it loads the stored tensors unchanged and turns them into one QuantLinear."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from qsun.errors import QsunError
from qsun.runtime.quant_linear import QuantLinear
from qsun.vllm.shards import LayerShard, ShardTensor, shard_tensors, unpack_shard
from qsun.vllm.stored import StoredLayers


@register_weight_loader_v2_supported_method
class QsunLinearMethod(LinearMethodBase):
    """Loads and computes one layer; vLLM uses one instance for each.

    Args:
        stored: the module's quantized layers.
        parts: the layers that vLLM fuses into this one.
        keep_dense: see QuantLinear.
    """

    def __init__(self, stored: StoredLayers, parts: list[str], keep_dense: bool):
        self.stored, self.parts, self.keep_dense = stored, parts, keep_dense

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        spec = self.stored.spec(self.parts, input_size)
        rows = tuple(output_partition_sizes)
        shard = LayerShard(self.parts[-1], self.stored.fmt, spec, input_size, input_size_per_partition, rows)
        self.shard, self.dtype = shard, params_dtype
        loader = self._loader(layer, extra_weight_attrs["weight_loader"])
        for suffix, tensor in shard_tensors(shard, self.stored.suffixes(self.parts)).items():
            layer.register_parameter(suffix, _parameter(tensor, loader, fused=len(self.parts) > 1))

    def _loader(self, layer: Any, loader: Callable[..., None]) -> Callable[..., None]:
        return loader

    def process_weights_after_loading(self, layer: Any) -> None:
        tensors = {suffix: getattr(layer, suffix).data for suffix in self.stored.suffixes(self.parts)}
        weights = unpack_shard(tensors, self.shard)
        for suffix in tensors:
            delattr(layer, suffix)
        layer.qsun = QuantLinear(weights, None, self.shard.spec.bits, self.dtype, self.keep_dense)
        layer.qweight = layer.qsun.scales  # vLLM's LoRA layers ask a tensor of this name for its device

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.qsun(x)
        return y if bias is None else y + bias


class QsunHeadMethod(QsunLinearMethod):
    """The output projection. vLLM pads its rows, and padded rows have the scale zero."""

    def _loader(self, layer: Any, loader: Callable[..., None]) -> Callable[..., None]:
        return lambda parameter, loaded: load_vocabulary(layer.shard_indices, parameter, loaded)


def load_vocabulary(indices: Any, parameter: BasevLLMParameter, loaded: Tensor) -> None:
    """Copy a rank's rows of the vocabulary. vLLM's own loader pads the first dimension, which may be K here.

    Args:
        indices: VocabParallelEmbeddingShardIndices of the layer.
    Raises:
        QsunError: a cut inside a packed word.
    """
    dim = getattr(parameter, "output_dim", None)
    if dim is None:
        parameter.data.copy_(loaded)
        return
    first, rows = indices.org_vocab_start_index, indices.num_org_elements
    if getattr(parameter, "packed_dim", None) == dim:
        first, rows = (_whole_words(count, parameter.packed_factor) for count in (first, rows))
    parameter.data.zero_()
    parameter.data.narrow(dim, 0, rows).copy_(loaded.narrow(dim, first, rows))


def _whole_words(values: int, factor: Any) -> int:
    words = values / factor
    if words.denominator != 1:
        raise QsunError(f"lm_head: a rank's rows begin or end at {values}, inside a packed word; use fewer ranks")
    return int(words)


class GroupIndex(RowvLLMParameter):
    """g_idx of a fused layer. Each of its parts is stored with one, and all must be equal."""

    def _assert_and_load(self, loaded_weight: Tensor) -> None:
        if int(self.data[0]) >= 0 and not torch.equal(self.data.cpu(), loaded_weight.cpu()):
            raise QsunError(
                "q_proj, k_proj, v_proj (or gate and up) have different activation orders (g_idx); use tools "
                "that give layers of one input one order, or quantize without desc_act"
            )
        super()._assert_and_load(loaded_weight)


def _parameter(tensor: ShardTensor, loader: Callable[..., None], fused: bool) -> BasevLLMParameter:
    """Return vLLM's parameter for a stored tensor. Scales start as NaN, so that one that no file fills is noticed."""
    fill = float("nan") if tensor.dtype.is_floating_point else -1
    data = torch.full(tensor.shape, fill, dtype=tensor.dtype)
    where = {"data": data, "weight_loader": loader}
    if tensor.input_dim is None and tensor.output_dim is None:
        return BasevLLMParameter(**where)
    if tensor.output_dim is None:
        return (GroupIndex if fused else RowvLLMParameter)(input_dim=tensor.input_dim, **where)
    where["output_dim"] = tensor.output_dim
    if tensor.packed_dim is not None:
        where |= {"packed_dim": tensor.packed_dim, "packed_factor": tensor.packed_factor}
        if tensor.input_dim is None:
            return PackedColumnParameter(**where)
        return PackedvLLMParameter(input_dim=tensor.input_dim, **where)
    if tensor.input_dim is None:
        return ChannelQuantScaleParameter(**where)
    return GroupQuantScaleParameter(input_dim=tensor.input_dim, **where)
