# mypy: ignore-errors
"""Kernels of a decode step around its products: norms, rotary positions with the KV write, and attention of one token.

Sums and rotations are in float32 with one rounding at the end, except where noted.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qsun.kernels.fields_triton import prefetch_into_l2


@triton.jit
def _follow(PDL: tl.constexpr):
    """Let the next kernel start, then wait for all before this one: what they write may not be used earlier.

    The next one waits in turn. These kernels are short, so the product after them has this long to fetch its weights.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def rms_norm_rows(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, width, eps, offset,
    ADD: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute out = norm(x) * (offset + weight), one program a row; ADD: of x + residual, which goes to sum, rounded.

    ROUND rounds the normalized row before the weight multiplies it, as Llama's norm does and Gemma's does not.
    """
    _follow(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    k = tl.arange(0, BLOCK)
    inside = k < width
    x = tl.load(x_ptr + row + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row + k, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row + k, rounded, mask=inside)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    if ROUND:
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + k, (normed * (offset + weight)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_rows(gate_up_ptr, out_ptr, width, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Compute out (rows, width) = SiLU(gate) * up of gate_up (rows, 2 width); GELU: its tanh form instead of SiLU."""
    _follow(PDL)
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up_ptr + row * 2 * width + k
    gate = tl.load(at, mask=k < width, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=k < width, other=0.0).to(tl.float32)
    bent = gate
    if GELU:  # (1 + tanh(z)) / 2 is sigmoid(2 z)
        bent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(out_ptr + row * width + k, (gate * tl.sigmoid(bent) * up).to(out_ptr.dtype.element_ty), mask=k < width)


@triton.jit
def _head(at, norm_ptr, d, width, rstd, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """Load elements d of a head; NORM: normalized, rounded where OFFSET is 0, times OFFSET + its weight."""
    x = tl.load(at + d, mask=d < width, other=0.0)
    if NORM:
        normed = x.to(tl.float32) * rstd
        if OFFSET == 0:
            normed = normed.to(x.dtype).to(tl.float32)
        return normed * (OFFSET + tl.load(norm_ptr + d, mask=d < width, other=0.0).to(tl.float32))
    else:
        return x.to(tl.float32)


@triton.jit
def _store_head(at, scale_at, x, d, inside, FP8: tl.constexpr):
    """Store a head of one token; FP8: as e4m3 over its own scale (448 is the largest).

    Rounded here, to 3 bits or to the step of subnormals: the cast of Triton's interpreter loses carries.
    """
    if FP8:
        x = x.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
        x /= scale
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        small = (x + 24576.0) - 24576.0  # float32's step there is 2^-9
        rounded = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
        # a NaN stays one: the sum above makes -0 of a GPU's own, 0x7FFFFFFF
        x = tl.where(x == x, rounded, x)  # noqa: PLR0124
        tl.store(at + d, x.to(at.dtype.element_ty), mask=inside)
        tl.store(scale_at, scale)
    else:
        tl.store(at + d, x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, columns_ptr, q_ptr,
    keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    stride_qkv, key_row, key_head, value_row, value_head, scale_row, scale_head, eps, heads, kv_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotate the queries and keys of one token a row, and write its keys and values into column columns[row].

    Grid: (rows, heads + 2 kv_heads). qkv: (rows, (heads + 2 kv_heads) D); cos, sin: (rows, D); q: (rows, heads, D).
    """
    _follow(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = qkv_ptr + row * stride_qkv + head * D
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    column = tl.load(columns_ptr + row).to(tl.int64)
    if head >= heads + kv_heads:
        kv_head = (head - heads - kv_heads).to(tl.int64)
        out = values_ptr + row * value_row + kv_head * value_head + column * D
        scale_at = value_scales_ptr + row * scale_row + kv_head * scale_head + column
        _store_head(out, scale_at, tl.load(at + d, mask=inside, other=0.0), d, inside, FP8)
    else:
        is_query = head < heads
        rstd = 1.0
        if NORM:
            plain = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(plain * plain, 0) / D + eps)
        norm_ptr = q_norm_ptr
        if NORM and not is_query:
            norm_ptr = k_norm_ptr
        x = _head(at, norm_ptr, d, D, rstd, NORM, OFFSET)
        if ROTATE:
            partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
            partner = tl.where(inside, partner, D)
            other = _head(at, norm_ptr, partner, D, rstd, NORM, OFFSET)
            cos = tl.load(cos_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
            x = x * cos + tl.where(d < D // 2, -other, other) * sin
        if is_query:
            tl.store(q_ptr + (row * heads + head) * D + d, x.to(q_ptr.dtype.element_ty), mask=inside)
        else:
            kv_head = (head - heads).to(tl.int64)
            out = keys_ptr + row * key_row + kv_head * key_head + column * D
            scale_at = key_scales_ptr + row * scale_row + kv_head * scale_head + column
            _store_head(out, scale_at, x.to(qkv_ptr.dtype.element_ty), d, inside, FP8)


@triton.jit
def _part_of_row(
    length, split, window, MOST_SPLITS: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr, WINDOW: tl.constexpr
):
    """Return the first column of a split, the one after its last, and how many splits the row has."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(length - first, MOST_SPLITS), BLOCK) * BLOCK, SHARE)
    start = first + split * share
    return start, tl.minimum(start + share, length), tl.cdiv(length - first, share)


@triton.jit
def _prefetch_kv(at, start, end, D: tl.constexpr):
    """Bring columns start .. end of a head into L2."""
    prefetch_into_l2(at + start * D, (end - start) * (D * at.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def split_attention(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, columns_ptr, out_ptr, partials_ptr, counters_ptr,
    key_row, key_head, value_row, value_head, scale_row, scale_head, kv_heads, scale, softcap, window,
    GROUP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    SHARE: tl.constexpr, MOST_SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one token a row to its columns 0 .. columns[row], of the last `window` where WINDOW is set.

    Grid: (rows * kv_heads, splits). GROUP query heads share a KV head; G is GROUP padded for the tensor cores. How a
    row is split depends on its own length alone, so that its result does not depend on the rows beside it. The last
    program to arrive adds the splits in their order; no atomic touches data.

    FP8: keys and values are e4m3, which one instruction for two turns into float16, exactly; bfloat16 would take three.
    So products are in float16, with q over its largest and values' scales times 448, and the rest in float32.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    if PDL:
        gdc_launch_dependents()
        # A hint: the length is read again after the wait, as the kernel before might have written it.
        length = tl.minimum(tl.load(columns_ptr + row).to(tl.int32) + 1, key_head // D)
        start, end, _ = _part_of_row(length, split, window, MOST_SPLITS, BLOCK, SHARE, WINDOW)
        end = tl.minimum(end, start + BLOCK)  # more would keep all programs waiting for their first columns
        _prefetch_kv(keys_ptr + row * key_row + head.to(tl.int64) * key_head, start, end, D)
        _prefetch_kv(values_ptr + row * value_row + head.to(tl.int64) * value_head, start, end, D)
        gdc_wait()
    length = tl.load(columns_ptr + row, cache_modifier=".cg").to(tl.int32) + 1
    start, end, used = _part_of_row(length, split, window, MOST_SPLITS, BLOCK, SHARE, WINDOW)
    if split < used:
        g, d, lane = tl.arange(0, G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
        q_at = ((row * kv_heads + head) * GROUP + g)[:, None] * D + d[None, :]
        q_inside = (g < GROUP)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + q_at, mask=q_inside, other=0.0)
        if FP8:
            largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
            q = (q.to(tl.float32) / largest[:, None]).to(tl.float16 if q.dtype == tl.bfloat16 else q.dtype)
        keys_at = keys_ptr + row * key_row + head.to(tl.int64) * key_head
        values_at = values_ptr + row * value_row + head.to(tl.int64) * value_head
        key_scales_at = key_scales_ptr + row * scale_row + head.to(tl.int64) * scale_head
        value_scales_at = value_scales_ptr + row * scale_row + head.to(tl.int64) * scale_head
        most = tl.full((G,), float("-inf"), tl.float32)
        total = tl.zeros((G,), tl.float32)
        acc = tl.zeros((G, BLOCK_D), tl.float32)
        for t in tl.range(start, end, BLOCK):
            n = t + lane
            at = n.to(tl.int64)[:, None] * D + d[None, :]
            inside = (n < end)[:, None] & (d < D)[None, :]
            keys = tl.load(keys_at + at, mask=inside, other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            if FP8:
                scores *= largest[:, None] * tl.load(key_scales_at + n, mask=n < end, other=0.0)[None, :]
            if SOFTCAP:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where((n < end)[None, :], scores * 1.4426950408889634, float("-inf"))
            above = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - above[:, None])
            fade = tl.exp2(most - above)
            values = tl.load(values_at + at, mask=inside, other=0.0).to(q.dtype)
            total = total * fade + tl.sum(weights, 1)
            if FP8:
                weights *= 448.0 * tl.load(value_scales_at + n, mask=n < end, other=0.0)[None, :]
            acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
            most = above
        if FP8:
            acc /= 448.0
        if used == 1:
            tl.store(out_ptr + q_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_inside)
        else:
            SIZE: tl.constexpr = G * BLOCK_D + 2 * G
            mine = partials_ptr + pair.to(tl.int64) * tl.num_programs(1) * SIZE
            inner = g[:, None] * BLOCK_D + d[None, :]
            head_inside = (g < GROUP)[:, None]
            tl.store(mine + split * SIZE + inner, acc, mask=head_inside)
            tl.store(mine + split * SIZE + G * BLOCK_D + g, most)
            tl.store(mine + split * SIZE + G * BLOCK_D + G + g, total)
            tl.debug_barrier()  # every thread has stored before one of them counts
            if tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel") == used - 1:
                s = tl.arange(0, triton.next_power_of_2(MOST_SPLITS))
                at = mine + s[None, :] * SIZE + G * BLOCK_D + g[:, None]
                mosts = tl.load(at, mask=(s < used)[None, :], other=float("-inf"), cache_modifier=".cg")
                totals = tl.load(at + G, mask=(s < used)[None, :], other=0.0, cache_modifier=".cg")
                most = tl.max(mosts, 1)
                total = tl.sum(totals * tl.exp2(mosts - most[:, None]), 1)
                acc = tl.zeros((G, BLOCK_D), tl.float32)
                for first_split in tl.range(0, used, 4):  # four at a time: each load would wait for L2
                    for i in tl.static_range(4):
                        there = tl.full((G,), first_split + i, tl.int32) < used
                        both = head_inside & there[:, None]
                        part = mine + (first_split + i) * SIZE
                        its_most = tl.load(
                            part + G * BLOCK_D + g, mask=there, other=float("-inf"), cache_modifier=".cg"
                        )
                        its_acc = tl.load(part + inner, mask=both, other=0.0, cache_modifier=".cg")
                        acc += its_acc * tl.exp2(its_most - most)[:, None]
                tl.store(counters_ptr + pair, 0)  # ready for the next launch
                tl.store(out_ptr + q_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_inside)
