"""Merge the linear layers of a block that read the same input: one launch for q, k and v, one for gate and up.

A decode step is made of small products; each launch that goes away is time and, for gate and up, a trip of the
activations through memory (SiLU(gate) * up is the product's epilogue). Rows keep their integers, so every output is
what the separate layers give.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qsun.model.architectures import Architecture, architecture_of
from qsun.model.quantized import Quantized
from qsun.runtime.quant_linear import QuantLinear


class Merged:
    """A product shared by several layers; the first that is asked computes it for all.

    Transformers calls q_proj(x), k_proj(x) and v_proj(x) one after another with the very same tensor. What was computed
    is kept until the last layer has taken its part, and only for that tensor.
    """

    def __init__(self, layer: QuantLinear, sizes: list[int]):
        self.layer, self.sizes = layer, sizes
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        kept = self._kept  # read once: another thread may replace it, and then this one computes for itself
        parts = kept[1] if kept is not None and kept[0] is x else self.layer(x).split(self.sizes, -1)
        self._kept = None if index == len(self.sizes) - 1 else (x, parts)
        return parts[index]


class MergedPart(nn.Module):
    """Stands where one of the merged layers stood."""

    def __init__(self, merged: Merged, index: int):
        super().__init__()
        self.merged, self.index = merged, index
        if index == 0:
            self.layer = merged.layer  # registered once, so that it moves with the model

    def forward(self, x: Tensor) -> Tensor:
        return self.merged.part(x, self.index)

    def extra_repr(self) -> str:
        return f"part={self.index} of {self.merged.sizes}"


class GatedMLP(nn.Module):
    """down_proj(SiLU(gate(x)) * up(x)) with gate and up in one product."""

    def __init__(self, gate_up: QuantLinear, down_proj: nn.Module):
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.gate_up.silu_mul(x))


def merge_projections(model: Any, config: Any) -> None:
    """Merge the projections of every block of a transformers model with QuantLinear layers, in place."""
    architecture = architecture_of(config.model_type)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    for block in model.model.layers:
        merge_block(block, architecture, activation in ("silu", "swish"))


def merge_block(block: nn.Module, architecture: Architecture, silu: bool) -> None:
    """Merge what can be merged in a block whose linear layers are QuantLinear, in place. silu: the MLP's activation."""
    for number in (0, 2):
        names = architecture.stages[number].layers
        layers = [block.get_submodule(name) for name in names]
        if len(layers) < 2 or not all(isinstance(layer, QuantLinear) for layer in layers):
            continue
        found: list[Any] = layers
        if not _fit(found):
            continue
        if number == 2 and silu and found[0].bias is None:
            down_proj = block.get_submodule(architecture.stages[3].layers[0])
            block.set_submodule(architecture.mlp, GatedMLP(_stack(found, gated=True), down_proj))
            continue
        merged = Merged(_stack(found, gated=False), [layer.out_features for layer in found])
        for index, name in enumerate(names):
            block.set_submodule(name, MergedPart(merged, index))


def _fit(layers: list[QuantLinear]) -> bool:
    """One grid, one column order, biases in all or in none."""

    def traits(layer: QuantLinear) -> tuple[Any, ...]:
        order = layer.column_order
        return (layer.groups, layer.bits, layer.storage, layer.bias is None, None if order is None else order.tolist())

    return all(traits(layer) == traits(layers[0]) for layer in layers)


def _stack(layers: list[QuantLinear], gated: bool) -> QuantLinear:
    weights = [layer.quantized() for layer in layers]
    stacked = Quantized(
        torch.cat([w.q for w in weights]),
        torch.cat([w.scales for w in weights], 1),
        torch.cat([w.zeros for w in weights], 1),
        weights[0].g_idx,
    )
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    first = layers[0]
    return QuantLinear(stacked, bias, first.bits, first.dtype, first.keep_dense, gated)
