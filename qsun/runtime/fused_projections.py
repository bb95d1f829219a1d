"""Merge the linear layers of a block that read the same input: one launch for q, k and v, one for gate and up.

A decode step is made of small products, so every launch saved is time saved; for gate and up it also saves writing the
activations to memory, since SiLU(gate) * up is the product's epilogue. Rows keep their integers and their results.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qsun.model.architectures import Architecture, architecture_of
from qsun.model.quantized import Quantized
from qsun.model.skeleton import plain_linear
from qsun.runtime.quant_linear import QuantLinear


class Merged:
    """A product shared by several layers; the first layer called computes it for all.

    Transformers calls q_proj(x), k_proj(x) and v_proj(x) one after another with the same tensor object. The result is
    kept for that tensor until the last layer has taken its part.
    """

    def __init__(self, layer: QuantLinear | nn.Linear, sizes: list[int]):
        self.layer, self.sizes = layer, sizes
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """Return the output of the layer at `index`."""
        kept = self._kept  # read once: another thread may replace it, and this one then computes its own
        parts = kept[1] if kept is not None and kept[0] is x else self.layer(x).split(self.sizes, -1)
        self._kept = None if index == len(self.sizes) - 1 else (x, parts)
        return parts[index]


class MergedPart(nn.Module):
    """Takes the place of one of the merged layers."""

    def __init__(self, merged: Merged, index: int):
        super().__init__()
        self.merged, self.index = merged, index
        if index == 0:
            self.layer = merged.layer  # registered once, so that it moves with the model

    def forward(self, x: Tensor) -> Tensor:
        return self.merged.part(x, self.index)

    def extra_repr(self) -> str:
        return f"part={self.index} of {self.merged.sizes}"


class DenseGateUp(nn.Linear):
    """A full-precision gate and up projection in one product."""

    def silu_mul(self, x: Tensor) -> Tensor:
        """Return SiLU(gate) * up."""
        gate, up = self(x).chunk(2, -1)
        return nn.functional.silu(gate) * up


class GatedMLP(nn.Module):
    """down_proj(SiLU(gate(x)) * up(x)) with gate and up in one product."""

    def __init__(self, gate_up: QuantLinear | DenseGateUp, down_proj: nn.Module):
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.gate_up.silu_mul(x))


def merge_projections(model: Any, config: Any, dense: bool = False) -> None:
    """Merge the projections of every block of a transformers model, in place.

    Args:
        dense: merge full-precision layers too; the model's state_dict changes then.
    """
    architecture = architecture_of(config.model_type)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    for block in model.model.layers:
        merge_block(block, architecture, activation in ("silu", "swish"), dense)


def merge_block(block: nn.Module, architecture: Architecture, silu: bool, dense: bool = False) -> None:
    """Merge a block's compatible layers of one input, in place. silu: whether the MLP's activation is SiLU."""
    for number in (0, 2):
        names = architecture.stages[number].layers
        layers = [block.get_submodule(name) for name in names]
        found: list[Any] = layers
        if len(found) < 2 or not _compatible(found, dense):
            continue
        if number == 2 and silu and found[0].bias is None:
            down_proj = block.get_submodule(architecture.stages[3].layers[0])
            block.set_submodule(architecture.mlp, GatedMLP(_stack(found, gated=True), down_proj))
            continue
        merged = Merged(_stack(found, gated=False), [layer.out_features for layer in found])
        for index, name in enumerate(names):
            block.set_submodule(name, MergedPart(merged, index))


def _compatible(layers: list[Any], dense: bool) -> bool:
    """Return whether layers have one grid, one column order, and biases in all or in none."""
    if dense and all(type(layer) is nn.Linear for layer in layers):
        return len({(layer.bias is None, layer.weight.dtype) for layer in layers}) == 1
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return False

    def traits(layer: QuantLinear) -> tuple[Any, ...]:
        order = layer.column_order
        return (layer.groups, layer.bits, layer.storage, layer.bias is None, None if order is None else order.tolist())

    return all(traits(layer) == traits(layers[0]) for layer in layers)


def _stack(layers: list[Any], gated: bool) -> Any:
    """Return one layer with the rows of all."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    if isinstance(layers[0], nn.Linear):
        return plain_linear(torch.cat([layer.weight for layer in layers]), bias, DenseGateUp if gated else nn.Linear)
    weights = [layer.quantized() for layer in layers]
    stacked = Quantized(
        torch.cat([w.q for w in weights]),
        torch.cat([w.scales for w in weights], 1),
        torch.cat([w.zeros for w in weights], 1),
        weights[0].g_idx,
    )
    first = layers[0]
    return QuantLinear(stacked, bias, first.bits, first.dtype, first.keep_dense, gated)
