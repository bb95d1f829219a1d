"""QuantLinear: a linear layer whose weights are integers, differentiable with respect to its input."""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from qsun.errors import QsunError
from qsun.kernels import int4_cpu, int4pack_cpu, packed_cuda
from qsun.kernels.layout import (
    INTERLEAVED_ROWS,
    PackedWeights,
    interleave_gate_up,
    pack_weights,
    packable,
    separate_gate_up,
    unpack_weights,
)
from qsun.kernels.reference import dequantize
from qsun.model.quantized import Quantized
from qsun.runtime import ops  # noqa: F401  (registers torch.ops.qsun)
from qsun.runtime.column_order import by_group, in_order

logger = logging.getLogger(__name__)
_CHUNK_ROWS = 256


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with W = (q - zeros) * scales.

    The integers are constants: gradients flow to x only. They are kept in one of these storages, chosen once:

    * "bytes": q (out, in) uint8, scales (groups, out) float32, zeros (groups, out) uint8. Any bits and shape.
    * "cpu_int4": two weights a byte as torch's int4 op reads them; at most 4 bits, bfloat16 activations, on a CPU.
    * "triton": packed as the Triton kernels read them, `bits` a weight; 16-bit activations, on a GPU that runs them.

    Attributes:
        storage: one of these names.
        bits: 2, 3, 4 or 8.
        dtype: of the activations that the storage was chosen for; others work too.
        keep_dense: make and keep a dequantized copy once an input is faster with one: on a CPU a large batch or a dtype
            other than bfloat16, on a GPU any input of the storage "bytes". It takes 2 or 4 bytes a weight.
        gated: the rows are those of a gate projection, then those of an up projection, for `silu_mul`.
    """

    q: Tensor
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weights: Quantized,
        bias: Tensor | None = None,
        bits: int = 4,
        dtype: torch.dtype = torch.float32,
        keep_dense: bool = False,
        gated: bool = False,
    ):
        super().__init__()
        self.out_features, self.in_features = weights.q.shape
        self.dtype, self.gated = dtype, gated
        self.groups, self.bits, self.keep_dense = weights.scales.shape[0], bits, keep_dense
        self._dense: Tensor | None = None
        self._store(weights)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @property
    def group_size(self) -> int:
        return -1 if self.groups == 1 else self.in_features // self.groups

    @property
    def column_order(self) -> Tensor | None:
        """The column order of activation-ordered groups; None for contiguous groups."""
        return self.g_idx if self.storage == "bytes" else self.order

    def quantized(self) -> Quantized:
        """Return the integers, columns in their original order."""
        if self.storage == "bytes":
            assert self.zeros is not None
            return Quantized(self.q, self.scales, self.zeros, self.g_idx)
        return in_order(self._unpacked(), self.order)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Dequantize (out, in) weights in float32, or in dtype where it is wider, and round once."""
        return _dense(self.quantized(), dtype)

    @property
    def weight(self) -> Tensor:
        """Dequantized weights, for code that reads a linear layer's dtype or device."""
        return self.weight_in(self.bias.dtype if self.bias is not None else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, silu_mul=False)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return this layer's product plus the residual, in one kernel where the storage has one."""
        if self.storage == "triton" and not self.gated:
            return self._product(x, silu_mul=False, residual=residual)
        return residual + self(x)

    def silu_mul(self, x: Tensor) -> Tensor:
        """Return SiLU(gate) * up for a layer whose rows are a gate projection's, then an up projection's."""
        grad = torch.is_grad_enabled() and x.requires_grad
        if self.storage != "bytes" and not grad:
            return self._product(x, silu_mul=True)
        gate, up = self(x).chunk(2, -1)
        return silu(gate) * up

    def _product(self, x: Tensor, silu_mul: bool, residual: Tensor | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        dense = self._dense_for(x)
        if x.is_cuda and dense is None and (self.storage == "bytes" or x.dtype != self.dtype):
            _warn_of_dequantizing(self.storage, self.dtype, x.dtype)
        if self.storage == "bytes":
            return torch.ops.qsun.bytes_linear.default(x, self.q, self.scales, self.zeros, self.g_idx, dense, bias)
        weights = (self.words, self.scales, self.zeros, self.order, dense, bias, residual)
        product: Any = torch.ops.qsun.packed_linear.default
        if self.storage == "cpu_int4" and not _needs_op(x):
            product = int4_cpu.int4_linear
        y = product(x, *weights, self.out_features, self.group_size, self.bits, silu_mul)
        return y if silu_mul or not self._interleaved else _gate_then_up(y)

    @property
    def _interleaved(self) -> bool:
        """Whether gate and up rows alternate, as the Triton kernels read them."""
        return self.gated and self.storage == "triton"

    def _store(self, weights: Quantized) -> None:
        weights, order = by_group(weights)
        self.storage = self._choose_storage(weights)
        buffers: dict[str, Tensor | None]
        if self.storage == "bytes":
            buffers = in_order(weights, order)._asdict()
        elif self.storage == "cpu_int4":
            words, scales = int4pack_cpu.pack(weights.q, weights.scales, weights.zeros)
            int4pack_cpu.prepare()
            buffers = {"words": words, "scales": scales, "zeros": None, "order": order}
        else:
            if not bool(weights.scales.to(self.dtype).isfinite().all()):
                largest = float(weights.scales.abs().max())
                raise QsunError(f"{self.dtype} cannot hold scales up to {largest:.3g}; use bfloat16")
            rows = [t.t() for t in (weights.q.t(), weights.scales, weights.zeros)]
            if self.gated:
                rows = [interleave_gate_up(*t.chunk(2)) for t in rows]
            packed = pack_weights(rows[0], rows[1].t(), rows[2].t(), self.group_size, self.dtype, self.bits)
            buffers = {**packed._asdict(), "order": order}
            self._reserve_workspace(weights.q.device)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def _reserve_workspace(self, device: torch.device) -> None:
        packed_cuda.reserve_workspace(self.out_features, self.in_features, self.group_size, self.bits, device)

    def _choose_storage(self, weights: Quantized) -> str:
        N, K, device = self.out_features, self.in_features, weights.q.device
        if weights.g_idx is not None or device.type not in ("cpu", "cuda"):
            return "bytes"
        if device.type == "cpu":
            fits = self.bits <= 4 and self.dtype == torch.bfloat16 and int4pack_cpu.usable(N, K, self.group_size)
            return "cpu_int4" if fits else "bytes"
        fits = self.dtype in (torch.bfloat16, torch.float16) and packable(N, K, self.group_size)
        return "triton" if fits and packed_cuda.available(device) else "bytes"

    def _unpacked(self) -> Quantized:
        """Return the integers, columns in stored order and rows in their original order."""
        if self.storage == "cpu_int4":
            return Quantized(*int4pack_cpu.unpack(self.words, self.scales, self.in_features, self.groups))
        packed = PackedWeights(self.words, self.scales, self.zeros)
        q, scales, zeros = unpack_weights(packed, self.out_features, self.in_features, self.group_size, self.bits)
        if self._interleaved:
            q, scales, zeros = (torch.cat(separate_gate_up(t)) for t in (q, scales.t(), zeros.t()))
            scales, zeros = scales.t(), zeros.t()
        return Quantized(q, scales.float(), zeros)

    def read_bytes(self, rows: int) -> int:
        """Return the bytes of weights that a product of this many rows in the layer's dtype reads."""
        x = torch.empty(rows, self.in_features, dtype=self.dtype, device="meta")
        if self._wants_dense(x):
            return self.out_features * self.in_features * self.dtype.itemsize
        return sum(t.numel() * t.element_size() for t in self._buffers.values() if t is not None)

    def _wants_dense(self, x: Tensor) -> bool:
        """Return whether a kept dequantized matrix is faster for this input, and may be kept."""
        if self.storage == "triton":
            return False
        if not self.keep_dense or self.storage == "bytes" or x.dtype != torch.bfloat16:
            return self.keep_dense
        grad = torch.is_grad_enabled() and x.requires_grad
        return grad or not int4pack_cpu.int4_wins(x.numel() // self.in_features)

    def _dense_for(self, x: Tensor) -> Tensor | None:
        """Return the kept dequantized matrix where it is faster for this input; columns in stored order."""
        if not self._wants_dense(x):
            return None
        if (self._dense is None or self._dense.dtype != x.dtype) and not torch.compiler.is_compiling():
            weights = self.quantized() if self.storage == "bytes" else self._unpacked()
            self._dense = _dense(weights, x.dtype)
        return self._dense if self._dense is not None and self._dense.dtype == x.dtype else None

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        """Store the weights anew on another kind of device and, on a GPU, for another dtype; else keep the scales."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device))
        device, cast = probe.device, probe.dtype != self.dtype
        if cast or device != self.scales.device:
            self._dense = None  # only then: captured graphs read it
        if self.bias is not None:
            self.bias = fn(self.bias)
        if device.type != self.scales.device.type or (cast and device.type == "cuda"):
            weights = self.quantized().to(device)
            self.dtype = probe.dtype if device.type == "cuda" else self.dtype
            self._store(weights)
        elif device != self.scales.device:
            for name, tensor in list(self._buffers.items()):
                self._buffers[name] = None if tensor is None else tensor.to(device)
            if self.storage == "triton":
                self._reserve_workspace(device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, storage={self.storage}"
        )


@cache
def _warn_of_dequantizing(storage: str, packed_for: torch.dtype, dtype: torch.dtype) -> None:
    """Warn once that a GPU dequantizes a matrix for every product."""
    if storage == "bytes":
        logger.warning("layers without a GPU kernel are dequantized for every product; load with keep_dense=True")
    else:
        logger.warning("%s inputs of layers packed for %s are slow; cast the model or its inputs", dtype, packed_for)


def _needs_op(x: Tensor) -> bool:
    """Return whether a product must pass torch's dispatcher; skipping it saves about 1% of a decode step on a CPU."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)


def _gate_then_up(y: Tensor) -> Tensor:
    """Return a product (..., N) of interleaved rows with gate's columns first, contiguous: adapters add to it."""
    blocks = y.reshape(*y.shape[:-1], y.shape[-1] // (2 * INTERLEAVED_ROWS), 2, INTERLEAVED_ROWS)
    return blocks.transpose(-3, -2).reshape(y.shape)


def _dense(weights: Quantized, dtype: torch.dtype) -> Tensor:
    """Dequantize (out, in) weights, a block of rows at a time."""
    out = torch.empty(weights.q.shape, dtype=dtype, device=weights.q.device)
    precise = torch.promote_types(dtype, torch.float32)
    for start in range(0, out.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        q, scales, zeros = weights.q[rows], weights.scales[:, rows], weights.zeros[:, rows]
        out[rows] = dequantize(q, scales, zeros, weights.g_idx, precise)
    return out
