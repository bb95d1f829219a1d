"""Triton kernels of a pretended device: each launch checks its operands and computes its definition in plain torch."""

import ctypes

import torch
from torch.nn.functional import gelu, silu

from qsun.kernels import bytes_product, decode_cuda, lora_triton, packed_cuda, packed_triton, workspace
from qsun.kernels.layout import INTERLEAVED_ROWS, PackedWeights, unpack_weights
from qsun.kernels.reference import dequantize
from qsun.quantization.methods import torch_loops, triton_loops
from qsun.runtime.kv_cache import encode_kv
from tests.pretend_cuda.tensors import STATE, PretendMode, PretendTensor


class Kernel:
    """Stands in for a triton.jit function: `kernel[grid](...)`."""

    def __init__(self, name, compute):
        self.name, self.compute = name, compute

    def __getitem__(self, grid):
        def launch(*args, **options):
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            assert all(isinstance(each, PretendTensor) for each in tensors), f"{self.name} got a tensor of the host"
            devices = {each.device.index for each in tensors}
            assert devices == {STATE.current}, f"{self.name} launches on cuda:{STATE.current}, tensors are on {devices}"
            assert max(grid[1:], default=0) <= 65535
            inner = [each.inner if isinstance(each, PretendTensor) else each for each in args]
            with torch.no_grad():
                self.compute(*inner, **options)
            STATE.log.launches.append({"kernel": self.name, "grid": grid, "args": args, **options})
            STATE.launch(f"triton::{self.name}", tensors[0].device, (self.compute, inner, options, None))

        return launch


def packed_matmul(
    x, words, scales, zeros, bias, residual, y, partials, counters, M, N, K, padded_n, stride_x, ahead, **options
):
    weight = weights(words, scales, zeros if options["ASYM"] else None, N, K, options["GROUP"], options["BITS"])
    product = x.float() @ weight.t()
    product = product + bias.float() if options["BIAS"] else product
    if options["SILU"]:
        gate, up = product.view(M, -1, 2, INTERLEAVED_ROWS).unbind(2)
        product = (silu(gate) * up).reshape(M, -1)
    y.copy_(product + residual.float() if options["RESIDUAL"] else product)


def dequantize_tiles(words, scales, zeros, out, N, K, padded_n, BITS, GROUP, ASYM, **options):
    out.copy_(weights(words, scales, zeros if ASYM else None, N, K, GROUP, BITS))


def rms_norm_rows(x, residual, weight, out, total, width, eps, offset, ADD, ROUND, **_):
    x = x.float()
    if ADD:
        x = total.copy_(x + residual.float()).float()
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = normed.to(out.dtype).float() if ROUND else normed
    out.copy_(normed * (offset + weight.float()))


def gated_rows(gate_up, out, width, GELU, **_):
    gate, up = gate_up.float().chunk(2, -1)
    out.copy_((gelu(gate, approximate="tanh") if GELU else silu(gate)) * up)


def rotate_and_store(
    qkv, cos, sin, q_norm, k_norm, columns, q, keys, values, key_scales, value_scales,
    stride_qkv, key_row, key_head, value_row, value_head, scale_row, scale_head, eps, heads, kv_heads,
    D, ROTATE, NORM, OFFSET, FP8, **_,
):  # fmt: skip
    rows = len(qkv)
    parts = qkv.view(rows, -1, D).split([heads, kv_heads, kv_heads], 1)
    caches = ((None, None), (keys, key_scales), (values, value_scales))
    for part, norm, (cache, scales) in zip(parts, (q_norm, k_norm, None), caches, strict=True):
        x = part.float()
        if NORM and norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            x = (x if OFFSET else x.to(qkv.dtype).float()) * (OFFSET + norm.float())
        if ROTATE and norm is not None:
            first, second = x.chunk(2, -1)
            x = x * cos.float()[:, None] + torch.cat([-second, first], -1) * sin.float()[:, None]
        if cache is None:
            q.copy_(x)
        elif FP8:
            stored, found = encode_kv(x.to(qkv.dtype))
            cache.view(torch.uint8)[torch.arange(rows), :, columns] = stored
            scales[torch.arange(rows), :, columns] = found
        else:
            cache[torch.arange(rows), :, columns] = x.to(cache.dtype)


def split_attention(
    q, keys, values, key_scales, value_scales, columns, out, partials, counters,
    key_row, key_head, value_row, value_head, scale_row, scale_head, kv_heads, scale, softcap, window,
    GROUP, SOFTCAP, WINDOW, FP8, **_,
):  # fmt: skip
    if FP8:
        keys, values = keys.float() * key_scales, values.float() * value_scales
    for row, column in enumerate(columns.tolist()):
        first = max(0, column + 1 - window) if WINDOW else 0
        k, v = (x[row, :, first : column + 1].float().repeat_interleave(GROUP, 0) for x in (keys, values))
        scores = torch.einsum("hd,hnd->hn", q[row].float(), k) * scale
        scores = softcap * (scores / softcap).tanh() if SOFTCAP else scores
        out[row] = torch.einsum("hn,hnd->hd", scores.softmax(-1), v)


def shrink_rows(x, table, tiles, low, M, K, stride_x, table_stride, share, BM, **_):
    low.fill_(float("nan"))
    for segment, first, end in tiles.tolist():
        address, _, rank = table[segment].tolist()
        rows = slice(first, min(end, first + BM))
        for split, columns in enumerate(torch.arange(K).split(share) if rank else ()):
            a = memory_at(address, (rank, K), x.dtype)[:, columns]
            low[split, rows] = 0
            low[split, rows, :rank] = x[rows][:, columns].float() @ a.float().t()


def expand_rows(y, table, tiles, low, M, N, stride_y, table_stride, splits, BM, **_):
    for segment, first, end in tiles.tolist():
        _, address, rank = table[segment].tolist()
        rows = slice(first, min(end, first + BM))
        if rank:
            b = memory_at(address, (rank, N), y.dtype)
            y[rows] = y[rows].float() + low[:, rows, :rank].sum(0).to(y.dtype).float() @ b.float()


def memory_at(address, shape, dtype):
    """The tensor that a kernel finds by its address."""
    count = torch.Size(shape).numel()
    held = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(held, dtype=dtype).view(shape)


def round_block(block, factor, scales, zeros, groups, integers, errors, columns, rows, top, **_):
    found = torch_loops.round_columns(block, factor, scales, zeros, groups, int(top))
    for target, value in zip((integers, errors), found, strict=True):
        target.copy_(value)


def move_block(integers, quantized, scales, zeros, pull, hessian, changes, columns, rows, size, top, **_):
    state, before = (integers, quantized, scales.clone(), zeros), quantized.clone()
    torch_loops.descend_columns(state, pull, hessian, len(pull) + 1, (int(top), torch.float16))
    changes.copy_(quantized - before)


def weights(words, scales, zeros, N, K, group, bits):
    q, scale, zero = unpack_weights(PackedWeights(words, scales, zeros), N, K, group or -1, bits)
    return dequantize(q, scale, zero, None, torch.float32)


def patches():
    """Yield (object, attribute, stand-in)."""
    yield packed_triton, "packed_matmul", Kernel("packed_matmul", packed_matmul)
    yield packed_triton, "dequantize_tiles", Kernel("dequantize_tiles", dequantize_tiles)
    for compute in (shrink_rows, expand_rows):
        yield lora_triton, compute.__name__, Kernel(compute.__name__, compute)
    yield workspace, "_of_devices", {}
    for compute in (rms_norm_rows, gated_rows, rotate_and_store, split_attention):
        yield decode_cuda, compute.__name__, Kernel(compute.__name__, compute)
    for compute in (round_block, move_block):
        yield triton_loops, compute.__name__, Kernel(compute.__name__, compute)
    operators = {
        "qsun::packed_linear": packed_cuda.packed_linear,
        "qsun::packed_input_grad": packed_cuda.packed_input_grad,
        "qsun::bytes_linear": bytes_product.bytes_linear,
        "qsun::bytes_input_grad": bytes_product.bytes_input_grad,
    }
    yield PretendMode, "operators", operators
