# mypy: ignore-errors
"""The W4A16 product: one kernel for every M, group size and zero point."""

import triton
import triton.language as tl

from qsun.kernels.nibbles_triton import (
    centred_weights,
    decode_group_values,
    load_group_values,
    offset_of,
    raw_weights,
    unit_of,
)


@triton.jit
def _load_tile(pointers, stride, COUNT: tl.constexpr, ASM: tl.constexpr):
    """Load the group values of one tile of 128 columns: a tuple of COUNT."""
    values = (load_group_values(pointers, ASM),)
    for g in tl.static_range(1, COUNT):
        values = values + (load_group_values(pointers + g * stride, ASM),)  # noqa: RUF005
    return values


@triton.jit(do_not_specialize=["M"])
def int4_matmul(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    partials_ptr,
    counters_ptr,
    M,
    N,
    K,
    padded_n,
    stride_x,
    BN: tl.constexpr,
    B: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    ASYM: tl.constexpr,
    FOLD: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute y (M, N or N / 2) = x (M, K) @ w.T, transposed in the tensor cores: BN weight rows by B rows of x.

    Grid: (N / BN rounded up, SPLIT_K, M / B rounded up). GROUP 0 is one group a row.

    FOLD multiplies the undecoded ``(OFFSET + q) * UNIT`` and subtracts ``(OFFSET + zero) * UNIT * sum(x)`` from the
    float32 accumulator; the sums come from a product with ones, the same for all rows of a warp. Otherwise each weight
    is centred before the product, which costs an instruction for two weights instead of a product.
    """
    DTYPE: tl.constexpr = (tl.bfloat16 if BF16 else tl.float16) if ASM else tl.float32
    OFFSET: tl.constexpr = offset_of(BF16)
    UNIT: tl.constexpr = unit_of(BF16)
    PLANES: tl.constexpr = GROUP // 32 if GROUP else 4
    GROUPS: tl.constexpr = 4 // PLANES
    LOAD_ZEROS: tl.constexpr = ASYM and GROUP > 0 and FOLD
    tiles = tl.cdiv(K, 128)
    share = tl.cdiv(tiles, SPLIT_K)
    first = tl.minimum(tl.program_id(1) * share, tiles)
    last = tl.minimum(first + share, tiles)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    batch = tl.program_id(2) * B + tl.arange(0, B)
    lane = tl.arange(0, 32)
    in_batch = batch[None, :] < M
    words_at = words_ptr + ((rows // 64) * tiles * 2048 + (rows % 64) * 32)[:, None] + first * 2048 + lane[None, :]
    x_at = x_ptr + batch[None, :] * stride_x + first * 128 + lane[:, None]
    scales_at = scales_ptr + rows
    zeros_at = zeros_ptr + rows
    ones = tl.full((BN, 32), 1.0, DTYPE)
    acc = tl.zeros((BN, B), tl.float32)
    sum_x = tl.zeros((BN, B), tl.float32)
    if GROUP:
        scales = _load_tile(scales_at + tl.minimum(first, tiles - 1) * GROUPS * padded_n, padded_n, GROUPS, ASM)
    if LOAD_ZEROS:
        zeros = _load_tile(zeros_at + tl.minimum(first, tiles - 1) * GROUPS * padded_n, padded_n, GROUPS, ASM)
    if not FOLD:
        minus = tl.full((BN, 32), -(OFFSET + 8.0) * UNIT, DTYPE)
        zeros_of = tl.broadcast_to(zeros_at[:, None], (BN, 32))
        if ASYM and GROUP == 0:
            z = decode_group_values(load_group_values(zeros_of, ASM), BF16, ASM)
            minus = (-(z + OFFSET) * UNIT).to(DTYPE)
    for t in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_at, eviction_policy="evict_first")
        following = tl.minimum(t + 1, tiles - 1) * GROUPS * padded_n
        for g in tl.static_range(GROUPS):
            if GROUP:
                part = tl.zeros((BN, B), tl.float32)
                sum_x = tl.zeros((BN, B), tl.float32)
                if ASYM and not FOLD:
                    at = zeros_of + (t * GROUPS + g) * padded_n
                    z = decode_group_values(load_group_values(at, ASM), BF16, ASM)
                    minus = (-(z + OFFSET) * UNIT).to(DTYPE)
            else:
                part = acc
            for p in tl.static_range(g * PLANES, (g + 1) * PLANES):
                inside = in_batch if EVEN_K else in_batch & (t * 128 + p * 32 + lane[:, None] < K)
                x = tl.load(x_at + p * 32, mask=inside, other=0.0).to(DTYPE)
                if FOLD:
                    sum_x = tl.dot(ones, x, sum_x, input_precision="ieee")
                    part = tl.dot(raw_weights(words, p, BF16, ASM), x, part, input_precision="ieee")
                else:
                    part = tl.dot(centred_weights(words, minus, p, BF16, ASM), x, part, input_precision="ieee")
            if GROUP:
                if LOAD_ZEROS:
                    z = decode_group_values(zeros[0], BF16, ASM)
                    part -= sum_x * ((z + OFFSET) * UNIT)[:, None]
                    # the next tile's value goes into the register that this one frees
                    zeros = zeros[1:] + (load_group_values(zeros_at + following + g * padded_n, ASM),)  # noqa: RUF005
                elif FOLD:
                    part -= sum_x * ((OFFSET + 8.0) * UNIT)
                acc += part * decode_group_values(scales[0], BF16, ASM)[:, None]
                scales = scales[1:] + (load_group_values(scales_at + following + g * padded_n, ASM),)  # noqa: RUF005
            else:
                acc = part
        words_at += 2048
        x_at += 128
    if GROUP == 0:
        if FOLD:
            z = decode_group_values(load_group_values(zeros_at, ASM), BF16, ASM)[:, None] if ASYM else 8.0
            acc -= sum_x * ((z + OFFSET) * UNIT)
        acc *= decode_group_values(load_group_values(scales_at, ASM), BF16, ASM)[:, None]
    acc *= 1.0 / UNIT
    _finish(
        acc, rows, batch, bias_ptr, residual_ptr, y_ptr, partials_ptr, counters_ptr, M, N,
        BN, B, SPLIT_K, BIAS, RESIDUAL, SILU
    )  # fmt: skip


@triton.jit
def _finish(
    acc, rows, batch, bias_ptr, residual_ptr, y_ptr, partials_ptr, counters_ptr, M, N,
    BN: tl.constexpr, B: tl.constexpr, SPLIT_K: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Add the splits in order and store. The last program to arrive adds them; no atomic touches data."""
    at = batch[None, :] * N + rows[:, None]
    inside = (batch[None, :] < M) & (rows[:, None] < N)
    if SPLIT_K == 1:
        _epilogue(acc, rows, batch, bias_ptr, residual_ptr, y_ptr, M, N, BN, B, BIAS, RESIDUAL, SILU)
    else:
        tl.store(partials_ptr + tl.program_id(1) * M * N + at, acc, mask=inside)
        tl.debug_barrier()  # every thread has stored before one of them counts
        counter = counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1:
            total = tl.zeros((BN, B), tl.float32)
            for split in tl.range(SPLIT_K):
                total += tl.load(partials_ptr + split * M * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)  # ready for the next launch
            _epilogue(total, rows, batch, bias_ptr, residual_ptr, y_ptr, M, N, BN, B, BIAS, RESIDUAL, SILU)


@triton.jit
def _epilogue(
    acc, rows, batch, bias_ptr, residual_ptr, y_ptr, M, N,
    BN: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Apply bias, SiLU(gate) * up and residual in float32, round once and store."""
    if BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if SILU:
        pairs = acc.reshape(BN // 16, 2, 8, B).permute(0, 2, 3, 1)
        gate, up = pairs.split()
        acc = (gate * tl.sigmoid(gate) * up).reshape(BN // 2, B)
        columns = N // 2
        rows = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    else:
        columns = N
    at = batch[None, :] * columns + rows[:, None]
    inside = (batch[None, :] < M) & (rows[:, None] < columns)
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
