# mypy: ignore-errors
"""Device functions that decode packed words and group values for tensor cores and accumulators, and fetch ahead.

A plane is the field of the same place in every word of a row (layout.py). In bfloat16 a field put below the bits of
128.0 reads 128 + q, or 128 + factor * q where it lies higher in the seven bits of the mantissa: two fields of 2 or 3
bits share one shift. float16 needs no offset: a field alone is the subnormal factor * q * 2^-24, which tensor cores
multiply exactly. So the kernels work with ``(OFFSET + factor * q) * UNIT``.

8 bits do not fit below 128.0. Two parts do, each of one instruction: 128 + (q & 127), and 128 + (q & 128), whose bit is
the lowest of the exponent. Both are multiplied by the same x, so together they read 256 + q.

ASM false is the portable path for the interpreter: the same algebra in float32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def offset_of(bits, bf16):
    """Return OFFSET, of all parts of a weight together."""
    return (256.0 if bits == 8 else 128.0) if bf16 else 0.0


@triton.constexpr_function
def unit_of(bf16):
    return 1.0 if bf16 else 2.0**-24


@triton.constexpr_function
def columns_of(bits):
    """Return the columns of a tile."""
    return 256 if bits < 4 else 128


@triton.constexpr_function
def slabs_of(bits):
    """Return how many words of one lane a row of a tile has."""
    return {2: 1, 3: 3, 4: 1, 8: 2}[bits]


@triton.constexpr_function
def lanes_of(bits):
    """Return the columns of a plane."""
    return 16 if bits == 3 else 32


@triton.constexpr_function
def slab_of(bits, plane):
    """Return the slab that holds a plane; the last plane of 3 bits is spread over all three."""
    return {2: 0, 3: min(plane // 5, 2), 4: 0, 8: plane // 2}[bits]


@triton.constexpr_function
def factor_of(bits, plane, paired=True):
    """Return the factor of q in a decoded field. paired: every second field shares the shift of the one before."""
    field = plane % 5 if bits == 3 else plane
    return 1 << bits if paired and bits < 4 and field % 2 and plane != 15 else 1


@triton.constexpr_function
def any_plane(bits, first, count, high, paired):
    """Return whether any of `count` planes has a factor (high), or none."""
    return any((factor_of(bits, plane, paired) > 1) == high for plane in range(first, first + count))


@triton.constexpr_function
def parts_of(bits, bf16):
    """Return into how many summands a weight is decoded."""
    return 2 if bits == 8 and bf16 else 1


@triton.constexpr_function
def spread(bits, plane):
    """Return whether a plane has one bit in each of three words."""
    return bits == 3 and plane == 15


@triton.constexpr_function
def _bit_of(bits, plane):
    """Return the lowest bit of a field in its word."""
    return 3 * (plane % 5) if bits == 3 else 8 * (plane % 2) if bits == 8 else bits * plane


@triton.constexpr_function
def _pair(half):
    """Return a constant of two equal halves as PTX."""
    return f"0x{half:04x}{half:04x}"


@triton.constexpr_function
def _take_asm(bits, plane, part, bf16, paired=True):
    """Return PTX that decodes a plane of two words into t. Its inputs are $1, or $1 to $3 where a plane is spread."""
    magic = 0x4300 if bf16 else 0
    if bits == 3 and plane == 15:
        code = f"shr.b32 t, $1, 15; lop3.b32 t, t, {_pair(1)}, {_pair(magic)}, 0xea;"
        code += f"shr.b32 u, $2, 14; lop3.b32 t, u, {_pair(2)}, t, 0xea;"
        return code + f"shr.b32 u, $3, 13; lop3.b32 t, u, {_pair(4)}, t, 0xea;"
    shift = _bit_of(bits, plane)
    shift -= bits if factor_of(bits, plane, paired) > 1 else 0
    mask = ((1 << bits) - 1) * factor_of(bits, plane, paired)
    if parts_of(bits, bf16) == 2:
        mask = 0x80 if part else 0x7F
    take = f"lop3.b32 t, t, {_pair(mask)}, {_pair(magic)}, 0xea;" if bf16 else f"and.b32 t, t, {_pair(mask)};"
    return f"shr.b32 t, $1, {shift};{take}"


@triton.constexpr_function
def _raw_asm(bits, plane, part, bf16, paired):
    return "{ .reg .b32 t, u; " + _take_asm(bits, plane, part, bf16, paired) + "mov.b32 $0, t; }"


@triton.constexpr_function
def _centred_asm(bits, plane, bf16, shifted):
    """Return PTX that subtracts the zero point from a decoded plane; bfloat16 adds by fma, as sm_80 has no packed add.

    The last input is -(OFFSET / factor + zero) * UNIT, and 128 - zero for bfloat16 of 8 bits, where shifted is false if
    every zero point is 128.
    """
    minus = "$4" if bits == 3 and plane == 15 else "$2"
    take = _take_asm(bits, plane, 0, bf16)
    kind = "bf16x2" if bf16 else "f16x2"
    if parts_of(bits, bf16) == 2:
        # (q & 128) ^ 0xc380 is -256 or -128, so the sum is q - 128
        high = f"shr.b32 u, $1, {_bit_of(bits, plane)}; lop3.b32 u, u, {_pair(0x80)}, {_pair(0xC380)}, 0x6a;"
        last = f"fma.rn.{kind} t, t, one, u; fma.rn.{kind} $0, t, one, {minus};"
        add = "mov.b32 one, 0x3f803f80;" + (last if shifted else f"fma.rn.{kind} $0, t, one, u;")
        return "{ .reg .b32 t, u, one; " + take + high + add + "}"
    factor = factor_of(bits, plane)
    if factor == 1 and not bf16:
        return "{ .reg .b32 t, u; " + take + f"add.rn.{kind} $0, t, {minus};" + "}"
    inverse = (0x3F80 if bf16 else 0x3C00) - ((factor.bit_length() - 1) << (7 if bf16 else 10))
    add = f"mov.b32 one, {_pair(inverse)}; fma.rn.{kind} $0, t, one, {minus};"
    return "{ .reg .b32 t, u, one; " + take + add + "}"


@triton.jit
def prefetch_into_l2(at, size):
    """Bring `size` bytes from an address on into L2, both multiples of 16; one thread asks. Up to 0: nothing."""
    tl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 one, t, 0; setp.gt.and.s32 one, $2, 0, one;"
        "@one cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _integers(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Return the q of a plane in float32; words: the slabs, int16."""
    SHIFT: tl.constexpr = _bit_of(BITS, PLANE)
    if spread(BITS, PLANE):
        q = words[0].to(tl.uint16, bitcast=True) >> 15
        for s in tl.static_range(1, 3):
            q = q | ((words[s].to(tl.uint16, bitcast=True) >> 15) << s)
    else:
        q = (words[slab_of(BITS, PLANE)].to(tl.uint16, bitcast=True) >> SHIFT) & ((1 << BITS) - 1)
    return q.to(tl.float32)


@triton.jit
def raw_weights(
    words,
    PLANE: tl.constexpr,
    PART: tl.constexpr,
    BITS: tl.constexpr,
    PAIRED: tl.constexpr,
    BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """Decode one part of (OFFSET + factor * q) * UNIT of a plane; words: the slabs, int16."""
    CODE: tl.constexpr = _raw_asm(BITS, PLANE, PART, BF16, PAIRED)
    if not ASM:
        q = _integers(words, PLANE, BITS)
        if parts_of(BITS, BF16) == 2:
            high = (q >= 128).to(tl.float32) * 128
            return 128.0 + (high if PART else q - high)
        return (offset_of(BITS, BF16) + factor_of(BITS, PLANE, PAIRED) * q) * unit_of(BF16)
    elif spread(BITS, PLANE):
        return tl.inline_asm_elementwise(
            CODE,
            "=r,r,r,r",
            [words[0], words[1], words[2]],
            dtype=tl.bfloat16 if BF16 else tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            CODE, "=r,r", [words[slab_of(BITS, PLANE)]], dtype=tl.bfloat16 if BF16 else tl.float16, is_pure=True, pack=2
        )


@triton.jit
def minus_of(zero, FACTOR: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Return what `centred_weights` adds for a zero point."""
    if parts_of(BITS, BF16) == 2:
        return 128.0 - zero
    else:
        return -(zero + offset_of(BITS, BF16) / FACTOR) * unit_of(BF16)


@triton.jit
def centred_weights(
    words, minus, PLANE: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr, SHIFTED: tl.constexpr, ASM: tl.constexpr
):
    """Decode (q - zero) * UNIT of a plane, exactly.

    minus: of `minus_of`, in the product's dtype. SHIFTED: whether zero points differ from the middle of the grid.
    """
    CODE: tl.constexpr = _centred_asm(BITS, PLANE, BF16, SHIFTED)
    if not ASM:
        q = _integers(words, PLANE, BITS)
        if parts_of(BITS, BF16) == 2:
            return q - 128.0 + minus
        return (offset_of(BITS, BF16) / factor_of(BITS, PLANE) + q) * unit_of(BF16) + minus
    elif spread(BITS, PLANE):
        return tl.inline_asm_elementwise(
            CODE, "=r,r,r,r,r", [words[0], words[1], words[2], minus], dtype=tl.bfloat16 if BF16 else tl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            CODE,
            "=r,r,r",
            [words[slab_of(BITS, PLANE)], minus],
            dtype=tl.bfloat16 if BF16 else tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def load_group_values(pointers, ASM: tl.constexpr):
    """Load one scale or zero point a row, 16 bits, still undecoded.

    `tl.load` chooses its own layout and exchanges the values through shared memory behind a barrier, in every pass. As
    an elementwise operation the load uses the layout of its result.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def decode_group_values(raw, BF16: tl.constexpr, ASM: tl.constexpr):
    """Convert the result of `load_group_values` to float32."""
    if not ASM:
        return raw
    elif BF16:
        return (raw << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_words(at, BITS: tl.constexpr):
    """Load a row's words of one tile: a tuple of slabs."""
    words = (tl.load(at, eviction_policy="evict_first"),)
    for s in tl.static_range(1, slabs_of(BITS)):
        words = words + (tl.load(at + s * lanes_of(BITS), eviction_policy="evict_first"),)  # noqa: RUF005
    return words


@triton.jit
def dequantize_tiles(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    N,
    K,
    padded_n,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ASYM: tl.constexpr,
):
    """Compute out (N, K) = (q - zero) * scale; one program for each tile of 64 rows."""
    COLUMNS: tl.constexpr = columns_of(BITS)
    LANES: tl.constexpr = lanes_of(BITS)
    PLANES: tl.constexpr = COLUMNS // LANES
    GROUPS: tl.constexpr = COLUMNS // GROUP if GROUP else 1
    WIDTH: tl.constexpr = slabs_of(BITS) * LANES
    block, tile = tl.program_id(0), tl.program_id(1)
    row, lane = tl.arange(0, 64), tl.arange(0, LANES)
    n = block * 64 + row
    at = (block.to(tl.int64) * tl.num_programs(1) + tile) * 64 * WIDTH
    words = load_words(words_ptr + at + row[:, None] * WIDTH + lane[None, :], BITS)
    for plane in tl.static_range(PLANES):
        k = tile * COLUMNS + plane * LANES + lane
        group = (tile * GROUPS + plane * GROUPS // PLANES if GROUP else 0) * padded_n
        scale = tl.load(scales_ptr + group + n).to(tl.float32)
        zero = tl.load(zeros_ptr + group + n).to(tl.float32)[:, None] if ASYM else 1.0 * (1 << (BITS - 1))
        value = (_integers(words, plane, BITS) - zero) * scale[:, None]
        inside = (n < N)[:, None] & (k < K)[None, :]
        out = out_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)
