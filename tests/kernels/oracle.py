"""Random quantized products, their exact results, and how far a kernel may be from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qsun.kernels.layout import PackedWeights, middle_of, pack_weights
from qsun.kernels.reference import dequantize

_EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass
class Product:
    """One product: inputs in the dtype under test on the device, the exact result in float64, and its error bound."""

    x: Tensor
    packed: PackedWeights
    group_size: int
    bits: int
    bias: Tensor | None
    residual: Tensor | None
    silu_mul: bool
    exact: Tensor
    bound: Tensor

    def arguments(self):
        return (self.x, *self.packed, self.exact.shape[1] * (2 if self.silu_mul else 1), self.group_size, self.bits)

    def options(self):
        return {"bias": self.bias, "residual": self.residual, "silu_mul": self.silu_mul}


def draw(M, N, K, group_size, dtype, zeros="random", scales="even", epilogue="", device="cpu", seed=0, gap=0, bits=4):
    """A random product.

    Args:
        zeros: "middle", "0", "top" (2^bits - 1), or "random" with 0 and the top among them.
        scales: "even" near 0.01, or "wild": groups of 1e-6 beside groups of 1e3, some negative.
        epilogue: any of the letters b(ias), r(esidual), s(ilu_mul).
        gap: columns between the rows of x, which lie in a larger tensor of NaNs. 0 is what a model has; 40 leaves rows
            that are not aligned to 16 elements.
    """
    generator = torch.Generator(device).manual_seed(seed)
    draws = {"generator": generator, "device": device}
    groups = 1 if group_size == -1 else K // group_size
    top = (1 << bits) - 1
    q = torch.randint(0, top + 1, (N, K), dtype=torch.uint8, **draws)
    q.view(-1)[:2] = torch.tensor([0, top])
    if zeros == "random":
        z = torch.randint(0, top + 1, (groups, N), **draws)
        z.view(-1)[:2] = torch.tensor([0, top])
    else:
        z = torch.full((groups, N), {"middle": middle_of(bits), "0": 0, "top": top}[zeros], device=device)
    s = (torch.rand(groups, N, **draws) + 0.5) * 0.02
    if scales == "wild":
        s *= torch.where(torch.rand(groups, N, **draws) < 0.5, 1e-4, 1e5) * torch.where(s > 0.02, -1, 1)
    s = s.to(dtype)
    around = torch.full((M + 3, K + gap), float("nan"), dtype=dtype, device=device)
    around[:M, :K] = torch.randn(M, K, **draws) * (0.45 / top if scales == "wild" else 1)
    x = around[:M, :K]
    w = dequantize(q, s, z, None, torch.float64)
    exact, spread = x.double() @ w.t(), x.double().abs() @ _magnitude(s, groups, K).t()
    bias = torch.randn(N, **draws).to(dtype) if "b" in epilogue else None
    exact = exact if bias is None else exact + bias.double()
    # float32 sums of x * (OFFSET + q) and of x * (OFFSET + zero): four unit roundoffs of the sum of their magnitudes
    undecoded = 2 * top if dtype == torch.float16 else 2 * ((256 if bits == 8 else 128) + top)
    bound = 2.0**-22 * undecoded * spread + 2.0**-22 * exact.abs()
    if "s" in epilogue:
        exact, bound = _silu_mul(exact, bound)
    residual = torch.randn(exact.shape, **draws).to(dtype) if "r" in epilogue else None
    exact = exact if residual is None else exact + residual.double()
    bound = bound + _EPS[dtype] * exact.abs() + 2.0**-25
    packed = pack_weights(q, s, z, group_size, dtype, bits)
    return Product(x, packed, group_size, bits, bias, residual, "s" in epilogue, exact, bound)


def _magnitude(scales, groups, K):
    """(N, K): the scale of every weight, positive."""
    return scales.double().abs().t().repeat_interleave(K // groups, 1)


def _silu_mul(y, bound):
    gate, up = y.view(y.shape[0], -1, 2, 8).unbind(2)
    gate_bound, up_bound = bound.view(y.shape[0], -1, 2, 8).unbind(2)
    # SiLU's slope is at most 1.1
    error = 1.1 * gate_bound * (up.abs() + up_bound) + gate.abs() * up_bound + 2.0**-20 * (gate * up).abs()
    product = torch.nn.functional.silu(gate) * up
    return product.reshape(y.shape[0], -1), error.reshape(y.shape[0], -1)
