"""A linear layer of fixed integers whose scales are learned, at what it will compute with once they are stored."""

from typing import Any

import torch
from torch import Tensor, nn

from qsun.model.quantized import Quantized
from qsun.quantization.methods.rounding import round_scales
from qsun.runtime.quant_linear import QuantLinear


class ScaledLinear(nn.Module):
    """``y = x W^T + bias`` with W = (q - zeros) * scales * (1 + gains), scales rounded as they are stored.

    Neither W nor its gradient is kept: the backward pass dequantizes again, so a layer takes one byte a weight.

    Attributes:
        gains: (groups, out) float32, 0 at the start; the only parameter.
    """

    def __init__(self, layer: QuantLinear, scale_dtype: torch.dtype):
        super().__init__()
        self.weights, self.bias, self.scale_dtype, self.bits = layer.quantized(), layer.bias, scale_dtype, layer.bits
        self.gains = nn.Parameter(torch.zeros_like(self.weights.scales))

    @property
    def scales(self) -> Tensor:
        """Return (groups, out) float32 scales, as they will be stored."""
        return round_scales(self.weights.scales * (1 + self.gains), self.scale_dtype)

    def forward(self, x: Tensor) -> Tensor:
        product: Any = _Product.apply
        y: Tensor = product(x, self.gains, self.weights._replace(scales=self.scales.detach()), self.weights.scales)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x W^T, with gradients of x and of the gains; the rounding of scales passes gradients unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gains: Tensor, weights: Quantized, first_scales: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights, ctx.first_scales = weights, first_scales
        return x @ weights.dequantize().to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,), weights = ctx.saved_tensors, upstream, ctx.weights
        of_x = gradient @ weights.dequantize().to(x.dtype) if ctx.needs_input_grad[0] else None
        of_weights = (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        steps = weights._replace(scales=torch.ones_like(weights.scales)).dequantize()  # q - zeros
        return of_x, _by_group(of_weights * steps, weights) * ctx.first_scales, None, None


def _by_group(columns: Tensor, weights: Quantized) -> Tensor:
    """Sum (out, in) over the columns of each group. Returns (groups, out)."""
    groups = weights.scales.shape[0]
    if weights.g_idx is None:
        return columns.view(len(columns), groups, -1).sum(-1).t()
    return columns.new_zeros(groups, len(columns)).index_add_(0, weights.g_idx.long(), columns.t())


def learn_scales(model: nn.Module, scale_dtype: torch.dtype, prefix: str) -> dict[str, ScaledLinear]:
    """Replace the quantized layers under a prefix in place. Returns them by name."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear) and name.startswith(prefix)}
    layers = {name: ScaledLinear(layer, scale_dtype) for name, layer in found.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers
