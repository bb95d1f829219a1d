# mypy: ignore-errors
"""The product with packed weights and 16-bit activations: one kernel for all bits, M, group sizes and zero points."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qsun.kernels.fields_triton import (
    any_plane,
    centred_weights,
    columns_of,
    decode_group_values,
    factor_of,
    lanes_of,
    load_group_values,
    load_words,
    minus_of,
    offset_of,
    parts_of,
    prefetch_into_l2,
    raw_weights,
    slabs_of,
    unit_of,
)


@triton.jit
def _group_row(start, g: tl.constexpr, last_group, padded_n, EXACT: tl.constexpr):
    """Return where the values of a group begin; those past the last one are not used, and its own are as good."""
    return (start + g if EXACT else tl.minimum(start + g, last_group)) * padded_n


@triton.jit
def _load_pass(pointers, start, last_group, padded_n, COUNT: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """Load the group values of one pass: a tuple of COUNT."""
    values = (load_group_values(pointers + _group_row(start, 0, last_group, padded_n, EXACT), ASM),)
    for g in tl.static_range(1, COUNT):
        at = pointers + _group_row(start, g, last_group, padded_n, EXACT)
        values = values + (load_group_values(at, ASM),)  # noqa: RUF005
    return values


@triton.jit
def _decode_pass(raw, COUNT: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Convert the result of `_load_pass` to float32."""
    values = (decode_group_values(raw[0], BF16, ASM),)
    for g in tl.static_range(1, COUNT):
        values = values + (decode_group_values(raw[g], BF16, ASM),)  # noqa: RUF005
    return values


@triton.jit
def _prefetch(values_ptr, start, last_group, padded_n, BN: tl.constexpr):
    """Bring the values of the next 64 groups into the L2 cache, so that later passes do not wait for DRAM."""
    LINES: tl.constexpr = BN // 64  # of 128 bytes in a row of values
    i = tl.arange(0, 64 * LINES)
    row = tl.minimum(start + i // LINES, last_group)
    at = values_ptr + row * padded_n + tl.program_id(0) * BN + i % LINES * 64
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_words(words_ptr, tile, count, tiles, BN: tl.constexpr, SIZE: tl.constexpr):
    """Bring `count` tiles of SIZE words of each 64 rows into L2."""
    size = tl.where(tl.program_id(2) == 0, count * (2 * SIZE), 0)
    for block in tl.static_range(BN // 64):
        at = words_ptr + ((tl.program_id(0) * (BN // 64) + block) * tiles + tile) * SIZE
        prefetch_into_l2(at, size)


@triton.jit
def _add_high(low, high, FIRST: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr):
    """Return low + high / factor, the sums of planes without and with a factor; either may have no planes."""
    FACTOR: tl.constexpr = 1 << BITS
    if not any_plane(BITS, FIRST, PLANES, True, PAIRED):
        return low
    elif any_plane(BITS, FIRST, PLANES, False, PAIRED):
        return low + high * (1.0 / FACTOR)
    else:
        return high * (1.0 / FACTOR)


@triton.jit(do_not_specialize=["M", "ahead"])
def packed_matmul(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, y_ptr, partials_ptr, counters_ptr,
    M, N, K, padded_n, stride_x, ahead,
    BITS: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, SPLIT_K: tl.constexpr,
    BF16: tl.constexpr, ASM: tl.constexpr, ASYM: tl.constexpr, FOLD: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SILU: tl.constexpr,
    EVEN_K: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute y (M, N or N / 2) = x (M, K) @ w.T, transposed in the tensor cores: BN weight rows by B rows of x.

    Grid: (N / BN rounded up, SPLIT_K, M / B rounded up). GROUP 0 is one group a row. A pass of the loop takes TILES
    tiles: scales are loaded one pass ahead, straight into registers, so a pass waits for memory at most once, however
    long it is. EVEN_K: K is a multiple of the columns of a pass.

    FOLD multiplies the undecoded ``(OFFSET + factor * q) * UNIT`` and subtracts the rest from the float32 accumulator.
    What it subtracts comes from products of x with constants, the same for all rows of a warp: with
    ``(OFFSET / factor + zero) * UNIT`` where all zero points are the middle of the grid, else with ones. Planes with a
    factor have an accumulator of their own. Otherwise each weight is centred before the product, which costs an
    instruction for two weights instead of a product.

    PDL: the program starts while the kernels before it still run. Until it waits for them, it only brings its scales
    and `ahead` tiles of its weights into L2; it reads and writes nothing. The next kernel may start once every program
    is past its wait.
    """
    DTYPE: tl.constexpr = (tl.bfloat16 if BF16 else tl.float16) if ASM else tl.float32
    OFFSET: tl.constexpr = offset_of(BITS, BF16)
    UNIT: tl.constexpr = unit_of(BF16)
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    HIGH: tl.constexpr = 1 << BITS  # the factor of planes that have one
    COLUMNS: tl.constexpr = columns_of(BITS)
    LANES: tl.constexpr = lanes_of(BITS)
    WIDTH: tl.constexpr = slabs_of(BITS) * LANES
    PLANES: tl.constexpr = (GROUP if GROUP else TILES * COLUMNS) // LANES
    GROUPS: tl.constexpr = TILES * COLUMNS // GROUP if GROUP else 1
    EXACT: tl.constexpr = EVEN_K or TILES == 1  # no pass has tiles past the last one
    IN_TILE: tl.constexpr = COLUMNS // LANES
    SLABS: tl.constexpr = slabs_of(BITS)
    # a second accumulator pays unless many small groups each add theirs to it
    PAIRED: tl.constexpr = not FOLD or B <= 8 or GROUP % 128 == 0
    LOAD_ZEROS: tl.constexpr = ASYM and GROUP > 0 and FOLD
    tiles = tl.cdiv(K, COLUMNS)
    passes = tl.cdiv(K, TILES * COLUMNS)
    if SPLIT_K == 1:
        first, last = 0, passes
    else:
        share = tl.cdiv(passes, SPLIT_K)
        first = tl.minimum(tl.program_id(1) * share, passes)
        last = tl.minimum(first + share, passes)
    last_group = tiles * (COLUMNS // GROUP) - 1 if GROUP else 0
    start = tl.minimum(first, passes - 1) * GROUPS
    if PDL:
        count = tl.minimum(last * TILES, tiles) - first * TILES
        _prefetch_words(words_ptr, first * TILES, tl.minimum(count, ahead), tiles, BN, 64 * WIDTH)
    if ASM and GROUP:
        _prefetch(scales_ptr, start, last_group, padded_n, BN)
        if LOAD_ZEROS:
            _prefetch(zeros_ptr, start, last_group, padded_n, BN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    batch = tl.program_id(2) * B + tl.arange(0, B)
    lane = tl.arange(0, LANES)
    in_batch = batch[None, :] < M
    row_at = (rows // 64) * tiles * (64 * WIDTH) + (rows % 64) * WIDTH
    words_at = words_ptr + row_at[:, None] + first * (TILES * 64 * WIDTH) + lane[None, :]
    x_at = x_ptr + batch[None, :] * stride_x + first * (TILES * COLUMNS) + lane[:, None]
    scales_at = scales_ptr + rows
    zeros_at = zeros_ptr + rows
    acc = tl.zeros((BN, B), tl.float32)
    acc_high = tl.zeros((BN, B), tl.float32)
    sum_x = tl.zeros((BN, B), tl.float32)
    sum_high = tl.zeros((BN, B), tl.float32)
    if GROUP:
        next_scales = _load_pass(scales_at, start, last_group, padded_n, GROUPS, EXACT, ASM)
    if LOAD_ZEROS:
        next_zeros = _load_pass(zeros_at, start, last_group, padded_n, GROUPS, EXACT, ASM)
    if not FOLD:
        minus = tl.full((BN, LANES), minus_of(MIDDLE, 1, BITS, BF16), DTYPE)
        minus_high = tl.full((BN, LANES), minus_of(MIDDLE, HIGH, BITS, BF16), DTYPE)
        zeros_of = tl.broadcast_to(zeros_at[:, None], (BN, LANES))
        if ASYM and GROUP == 0:
            z = decode_group_values(load_group_values(zeros_of, ASM), BF16, ASM)
            minus = minus_of(z, 1, BITS, BF16).to(DTYPE)
            minus_high = minus_of(z, HIGH, BITS, BF16).to(DTYPE)
    for t in tl.range(first, last, num_stages=STAGES):
        words = load_words(words_at, BITS)
        for i in tl.static_range(1, TILES):
            next_tile = i if EVEN_K else tl.minimum(i, tiles - 1 - t * TILES)
            words = words + load_words(words_at + next_tile * (64 * WIDTH), BITS)
        following = tl.minimum(t + 1, passes - 1) * GROUPS
        if GROUP:
            scales = _decode_pass(next_scales, GROUPS, BF16, ASM)
            next_scales = _load_pass(scales_at, following, last_group, padded_n, GROUPS, EXACT, ASM)
        if LOAD_ZEROS:
            zeros = _decode_pass(next_zeros, GROUPS, BF16, ASM)
            next_zeros = _load_pass(zeros_at, following, last_group, padded_n, GROUPS, EXACT, ASM)
        for g in tl.static_range(GROUPS):
            if GROUP:
                part = tl.zeros((BN, B), tl.float32)
                high = tl.zeros((BN, B), tl.float32)
                sum_x = tl.zeros((BN, B), tl.float32)
                sum_high = tl.zeros((BN, B), tl.float32)
                if ASYM and not FOLD:
                    at = zeros_of + _group_row(t * GROUPS, g, last_group, padded_n, EXACT)
                    z = decode_group_values(load_group_values(at, ASM), BF16, ASM)
                    minus = minus_of(z, 1, BITS, BF16).to(DTYPE)
                    minus_high = minus_of(z, HIGH, BITS, BF16).to(DTYPE)
            else:
                part = acc
                high = acc_high
            for p in tl.static_range(g * PLANES, (g + 1) * PLANES):
                inside = in_batch if EVEN_K else in_batch & (t * (TILES * COLUMNS) + p * LANES + lane[:, None] < K)
                slabs = words[p // IN_TILE * SLABS : (p // IN_TILE + 1) * SLABS]
                x = tl.load(x_at + p * LANES, mask=inside, other=0.0).to(DTYPE)
                if FOLD:
                    known = 1.0 if ASYM else (OFFSET / factor_of(BITS, p % IN_TILE, PAIRED) + MIDDLE) * UNIT
                    constant = tl.full((BN, LANES), known, DTYPE)
                    if ASYM and factor_of(BITS, p % IN_TILE, PAIRED) > 1:
                        sum_high = tl.dot(constant, x, sum_high, input_precision="ieee")
                    else:
                        sum_x = tl.dot(constant, x, sum_x, input_precision="ieee")
                    for i in tl.static_range(parts_of(BITS, BF16)):
                        weights = raw_weights(slabs, p % IN_TILE, i, BITS, PAIRED, BF16, ASM)
                        if factor_of(BITS, p % IN_TILE, PAIRED) > 1:
                            high = tl.dot(weights, x, high, input_precision="ieee")
                        else:
                            part = tl.dot(weights, x, part, input_precision="ieee")
                else:
                    shift = minus_high if factor_of(BITS, p % IN_TILE, PAIRED) > 1 else minus
                    weights = centred_weights(slabs, shift, p % IN_TILE, BITS, BF16, ASYM, ASM)
                    part = tl.dot(weights, x, part, input_precision="ieee")
            if GROUP:
                if FOLD:
                    part = _add_high(part, high, g * PLANES % IN_TILE, PLANES, BITS, PAIRED)
                    if ASYM:
                        z = zeros[g]
                        if any_plane(BITS, g * PLANES % IN_TILE, PLANES, False, PAIRED):
                            part -= sum_x * ((z + OFFSET) * UNIT)[:, None]
                        if any_plane(BITS, g * PLANES % IN_TILE, PLANES, True, PAIRED):
                            part -= sum_high * ((z + OFFSET / HIGH) * UNIT)[:, None]
                    else:
                        part -= sum_x
                acc += part * scales[g][:, None]
            else:
                acc = part
                acc_high = high
        words_at += TILES * 64 * WIDTH
        x_at += TILES * COLUMNS
    if GROUP == 0:
        if FOLD:
            acc = _add_high(acc, acc_high, 0, PLANES, BITS, PAIRED)
            if ASYM:
                z = decode_group_values(load_group_values(zeros_at, ASM), BF16, ASM)[:, None]
                acc -= sum_x * ((z + OFFSET) * UNIT)
                if any_plane(BITS, 0, PLANES, True, PAIRED):
                    acc -= sum_high * ((z + OFFSET / HIGH) * UNIT)
            else:
                acc -= sum_x
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
            for four in tl.range(0, SPLIT_K, 4):  # one after another, each load would wait for L2
                for i in tl.static_range(4):
                    there = inside & (four + i < SPLIT_K)
                    part = partials_ptr + (four + i) * M * N + at
                    total += tl.load(part, mask=there, other=0.0, cache_modifier=".cg")
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
