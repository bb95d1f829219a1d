# mypy: ignore-errors
"""Device functions that decode packed words and group values for tensor cores and accumulators.

In bfloat16 a nibble put below the bits of 128.0 reads 128 + q. float16 needs no offset: a nibble alone is the subnormal
q * 2^-24, which tensor cores multiply exactly. So the kernels work with ``(OFFSET + q) * UNIT``: (128, 1) in bfloat16,
(0, 2^-24) in float16. After a shift, one instruction decodes two weights.

ASM false is the portable path for the interpreter: the same algebra in float32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def offset_of(bf16):
    return 128.0 if bf16 else 0.0


@triton.constexpr_function
def unit_of(bf16):
    return 1.0 if bf16 else 2.0**-24


@triton.constexpr_function
def _plane_asm(plane, bf16, tail):
    """Return PTX that extracts nibble `plane` of two 16-bit words into t, followed by `tail`."""
    shift = f"shr.b32 t, $1, {4 * plane};"
    take = "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;" if bf16 else "and.b32 t, t, 0x000f000f;"
    return "{ .reg .b32 t, one; " + shift + take + tail + "}"


@triton.constexpr_function
def _add_asm(bf16):
    """Return PTX that adds pairs; in bfloat16 by fma, as sm_80 has no packed addition of them."""
    return "mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, t, one, $2;" if bf16 else "add.rn.f16x2 $0, t, $2;"


@triton.jit
def raw_weights(words, PLANE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Decode (OFFSET + q) * UNIT of one nibble plane; words: int16."""
    if ASM:
        return tl.inline_asm_elementwise(
            _plane_asm(PLANE, BF16, "mov.b32 $0, t;"),
            "=r,r",
            [words],
            dtype=tl.bfloat16 if BF16 else tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        q = ((words.to(tl.uint16, bitcast=True) >> (4 * PLANE)) & 15).to(tl.float32)
        return (q + offset_of(BF16)) * unit_of(BF16)


@triton.jit
def centred_weights(words, minus, PLANE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """Decode (q - zero) * UNIT of one nibble plane, exactly; minus: -(OFFSET + zero) * UNIT in the product's dtype."""
    if ASM:
        return tl.inline_asm_elementwise(
            _plane_asm(PLANE, BF16, _add_asm(BF16)),
            "=r,r,r",
            [words, minus],
            dtype=tl.bfloat16 if BF16 else tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return raw_weights(words, PLANE, BF16, ASM) + minus


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
def dequantize_tiles(
    words_ptr, scales_ptr, zeros_ptr, out_ptr, N, K, padded_n, GROUP: tl.constexpr, ASYM: tl.constexpr
):
    """Compute out (N, K) = (q - zero) * scale; one program for each tile of 64 rows and 128 columns."""
    GROUPS: tl.constexpr = 128 // GROUP if GROUP else 1
    block, tile = tl.program_id(0), tl.program_id(1)
    row, lane = tl.arange(0, 64), tl.arange(0, 32)
    n = block * 64 + row
    at = (block.to(tl.int64) * tl.num_programs(1) + tile) * 2048
    words = tl.load(words_ptr + at + row[:, None] * 32 + lane[None, :]).to(tl.uint16, bitcast=True)
    for plane in tl.static_range(4):
        k = tile * 128 + plane * 32 + lane
        group = (tile * GROUPS + plane * GROUPS // 4 if GROUP else 0) * padded_n
        scale = tl.load(scales_ptr + group + n).to(tl.float32)
        zero = tl.load(zeros_ptr + group + n).to(tl.float32)[:, None] if ASYM else 8.0
        value = (((words >> (4 * plane)) & 15).to(tl.float32) - zero) * scale[:, None]
        inside = (n < N)[:, None] & (k < K)[None, :]
        out = out_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)
