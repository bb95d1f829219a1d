"""The torch operators behind QuantLinear: one opaque op for each storage, differentiable with respect to its input.

torch.compile and CUDA graphs see only `qsun::packed_linear` or `qsun::bytes_linear`, not their implementation. Weights
are constants: gradients flow to x only, through `qsun::..._input_grad`.

Register operators only here: torch refuses to define one twice.
"""

from typing import Any

import torch
from torch import Tensor

from qsun.kernels import int4_cpu, packed_cuda
from qsun.kernels.bytes_product import bytes_input_grad, bytes_linear

torch.library.define(
    "qsun::bytes_linear",
    "(Tensor x, Tensor q, Tensor scales, Tensor zeros, Tensor? g_idx, Tensor? dense, Tensor? bias) -> Tensor",
)
torch.library.define(
    "qsun::bytes_input_grad",
    "(Tensor grad, Tensor q, Tensor scales, Tensor zeros, Tensor? g_idx, Tensor? dense) -> Tensor",
)
torch.library.define(
    "qsun::packed_linear",
    "(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, Tensor? dense, Tensor? bias, "
    "Tensor? residual, int out_features, int group_size, int bits, bool silu_mul) -> Tensor",
)
torch.library.define(
    "qsun::packed_input_grad",
    "(Tensor grad, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, Tensor? dense, "
    "int in_features, int group_size, int bits) -> Tensor",
)


torch.library.impl("qsun::bytes_linear", "CompositeExplicitAutograd", bytes_linear)
torch.library.impl("qsun::bytes_input_grad", "CompositeExplicitAutograd", bytes_input_grad)
torch.library.impl("qsun::packed_linear", "CPU", int4_cpu.int4_linear)
torch.library.impl("qsun::packed_input_grad", "CPU", int4_cpu.int4_input_grad)
torch.library.impl("qsun::packed_linear", "CUDA", packed_cuda.packed_linear)
torch.library.impl("qsun::packed_input_grad", "CUDA", packed_cuda.packed_input_grad)


# --- shapes for torch.compile, and the gradient -----------------------------------------------------------------------


def _bytes_linear_fake(x: Tensor, q: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


def _bytes_input_grad_fake(grad: Tensor, q: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], q.shape[1]))


def _packed_linear_fake(x: Tensor, words: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    out_features, _group_size, _bits, silu_mul = rest[-4:]
    return x.new_empty((*x.shape[:-1], out_features // 2 if silu_mul else out_features))


def _packed_input_grad_fake(
    grad: Tensor, words: Tensor, scales: Tensor, zeros: Any, order: Any, dense: Any, K: int, *_: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], K))


def _keep_bytes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, *weights, _bias = inputs
    ctx.weights = weights


def _bytes_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.qsun.bytes_input_grad(grad, *ctx.weights), *[None] * 6


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weights, _bias, residual, _out_features, group_size, bits, silu_mul = inputs
    if silu_mul or residual is not None:
        raise NotImplementedError("packed_linear has no gradient through its silu_mul and residual epilogues")
    ctx.weights = *weights, x.shape[-1], group_size, bits


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.qsun.packed_input_grad(grad, *ctx.weights), *[None] * 11


torch.library.register_autograd("qsun::bytes_linear", _bytes_backward, setup_context=_keep_bytes)
torch.library.register_autograd("qsun::packed_linear", _packed_backward, setup_context=_keep_packed)
torch.library.register_fake("qsun::bytes_linear", _bytes_linear_fake)
torch.library.register_fake("qsun::bytes_input_grad", _bytes_input_grad_fake)
torch.library.register_fake("qsun::packed_linear", _packed_linear_fake)
torch.library.register_fake("qsun::packed_input_grad", _packed_input_grad_fake)
