"""A decode step's norms, rotations and attention on a GPU, from tensors to tensors; torch's definitions are in tests.

In Triton's interpreter (TRITON_INTERPRET=1) they run on a CPU, in float16 and float32.
"""

import torch
import triton
from torch import Tensor

from qsun.kernels.decode_triton import gated_rows, rms_norm_rows, rotate_and_store, split_attention
from qsun.kernels.layout import ceil_div
from qsun.kernels.packed_triton import pdl_options
from qsun.kernels.workspace import Workspace, reserve

HEAD_DIMS = range(64, 257, 16)
_SHARE, _MOST_SPLITS = 128, 64  # columns of a split at least; splits of a row at most


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Return x / rms(x) * (offset + weight). x: (..., width), contiguous."""
    return _norm(x, None, weight, eps, offset)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (norm of the sum, sum) of x and residual, (..., width), contiguous."""
    return _norm(x, residual, weight, eps, offset)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    width, out = x.shape[-1], torch.empty_like(x)
    total = out if residual is None else torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(width)
        rms_norm_rows[(x.numel() // width,)](
            *(x, x if residual is None else residual, weight, out, total, width, eps, offset),
            ADD=residual is not None,
            ROUND=offset == 0,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
            **pdl_options(x.device),
        )
    return out, total


def silu_mul(gate_up: Tensor, gelu: bool = False) -> Tensor:
    """Return SiLU(gate) * up of (..., 2 I), contiguous: (..., I); gelu: the tanh form of GELU instead of SiLU."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if out.numel():
        grid = out.numel() // width, ceil_div(width, 1024)
        gated_rows[grid](gate_up, out, width, GELU=gelu, BLOCK=1024, num_warps=4, **pdl_options(out.device))
    return out


def rotate_and_store_kv(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    kv_scales: tuple[Tensor, Tensor] | None = None,
    norm_offset: float = 0.0,
) -> Tensor:
    """Rotate the queries and keys of one token a row, write its keys and values, and return the queries.

    Args:
        qkv: (rows, (heads + 2 kv_heads) head_dim), columns contiguous.
        rotation: cos and sin, (rows, head_dim) each, contiguous; None: no rotary positions.
        norms: weights of the RMS norms of query and key heads, and their eps; None: none.
        keys, values: (rows, kv_heads, columns, head_dim), each head contiguous; written to.
        columns: (rows,) int64, where each row's token goes.
        kv_scales: written to as well where keys and values are float8_e4m3fn: float32, (rows, kv_heads, columns, 1).
        norm_offset: added to the weights of `norms`; where it is not 0, nothing is rounded before they multiply.
    Returns:
        (rows, heads, head_dim).
    """
    rows, (kv_heads, _, width) = qkv.shape[0], keys.shape[1:]
    heads = qkv.shape[1] // width - 2 * kv_heads
    q = qkv.new_empty((rows, heads, width))
    cos, sin = rotation or (qkv, qkv)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    scales, scale_strides = _scales(kv_scales, q)
    rotate_and_store[rows, heads + 2 * kv_heads](
        *(qkv, cos, sin, q_norm, k_norm, columns, q, keys, values, *scales),
        *(qkv.stride(0), *keys.stride()[:2], *values.stride()[:2], *scale_strides, eps, heads, kv_heads),
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        ROTATE=rotation is not None,
        NORM=norms is not None,
        OFFSET=norm_offset,
        FP8=kv_scales is not None,
        num_warps=1,
        **pdl_options(qkv.device),
    )
    return q


def _scales(kv_scales: tuple[Tensor, Tensor] | None, unused: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Return the scales of keys and values and the strides of both; where there are none, what is not read."""
    if kv_scales is None:
        return (unused, unused), (0, 0)
    assert kv_scales[0].stride() == kv_scales[1].stride()
    return kv_scales, kv_scales[0].stride()[:2]


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    workspace: Workspace | None = None,
    kv_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one token a row to its own columns; the same bits whatever the other rows are.

    Args:
        q: (rows, heads, head_dim), contiguous.
        keys, values: (rows, kv_heads, capacity, head_dim), each head contiguous.
        columns: (rows,) int64, the token's own column: it sees 0 .. columns, or the last `window` of them.
        softcap: scores become softcap * tanh(scores / softcap).
        workspace: at least attention_workspace_bytes; None takes the device's own, and makes it larger where needed.
        kv_scales: of keys and values in float8_e4m3fn: float32, (rows, kv_heads, capacity, 1) with equal strides.
    Returns:
        (rows, heads * head_dim).
    Raises:
        ValueError: heads that kv_heads does not divide, or a head_dim that is not supported.
    """
    (rows, heads, width), (kv_heads, capacity) = q.shape, keys.shape[1:3]
    if heads % kv_heads or width not in HEAD_DIMS:
        raise ValueError(f"{heads} heads of {width} over {kv_heads} KV heads; use a multiple, of 64 to 256 by 16")
    group, splits = heads // kv_heads, min(ceil_div(capacity, _SHARE), _MOST_SPLITS)
    partial_bytes, counters = attention_workspace_bytes(rows, heads, kv_heads, width, capacity)
    space = workspace or reserve(q.device, partial_bytes, counters)
    out = torch.empty_like(q)
    block_d = triton.next_power_of_2(width)
    scales, scale_strides = _scales(kv_scales, q)
    split_attention[rows * kv_heads, splits](
        *(q, keys, values, *scales, columns, out),
        *(space.view((partial_bytes // 4,), torch.float32), space.tickets(counters)),
        *(*keys.stride()[:2], *values.stride()[:2], *scale_strides, kv_heads, scale, softcap or 0.0, window or 0),
        GROUP=group,
        G=_padded_group(group),
        D=width,
        BLOCK_D=block_d,
        BLOCK=64 if block_d <= 128 else 32,
        SHARE=_SHARE,
        MOST_SPLITS=_MOST_SPLITS,
        SOFTCAP=softcap is not None,
        WINDOW=window is not None,
        FP8=kv_scales is not None,
        num_warps=4,
        num_stages=2,
        **pdl_options(q.device),
    )
    return out.view(rows, heads * width)


def attention_workspace_bytes(rows: int, heads: int, kv_heads: int, width: int, capacity: int) -> tuple[int, int]:
    """Return (bytes, counters) that `decode_attention` needs."""
    splits = min(ceil_div(capacity, _SHARE), _MOST_SPLITS)
    group = _padded_group(heads // kv_heads)
    return 4 * rows * kv_heads * splits * group * (triton.next_power_of_2(width) + 2), rows * kv_heads


def _padded_group(group: int) -> int:
    """Return the query heads of a KV head as rows of a tensor core's product."""
    return int(max(16, triton.next_power_of_2(group)))
