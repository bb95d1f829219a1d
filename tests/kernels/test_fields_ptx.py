"""The PTX that decodes packed weights on a GPU, run by a small machine: neither the interpreter nor a compiler does.

Every instruction is exact here, and a result that its type could not hold fails.
"""

import random
import struct

import pytest

from qsun.kernels import fields_triton
from qsun.kernels.layout import TILES, _fields


def call(name, *arguments):
    """Call a constexpr function of the kernels as plain Python."""
    return getattr(fields_triton, name).fn(*arguments)


def to_float(half, bf16):
    return (
        struct.unpack("<f", struct.pack("<I", half << 16))[0]
        if bf16
        else struct.unpack("<e", half.to_bytes(2, "little"))[0]
    )


def to_half(value, bf16):
    if bf16:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        assert bits & 0xFFFF == 0, f"{value} is no bfloat16"
        return bits >> 16
    half = int.from_bytes(struct.pack("<e", value), "little")
    assert to_float(half, bf16=False) == value, f"{value} is no float16"
    return half


def halves(word, bf16):
    return [to_float(word >> shift & 0xFFFF, bf16) for shift in (0, 16)]


def lop3(a, b, c, table):
    """Combine three words bit by bit: bit i of the table is the result for the bits (a, b, c) of i."""
    words, full = (a, b, c), 0xFFFFFFFF
    result = 0
    for index in range(8):
        if table >> index & 1:
            terms = (word if index >> (2 - place) & 1 else ~word for place, word in enumerate(words))
            found = full
            for term in terms:
                found &= term
            result |= found
    return result & full


def run(code, inputs):
    """Run straight-line PTX on 32-bit registers; inputs are $1, $2 and so on. Returns $0."""
    registers = {f"${number}": word for number, word in enumerate(inputs, 1)}

    def value(text):
        return registers[text] if text in registers else int(text, 0)

    for line in code.replace("{", "").replace("}", "").split(";"):
        operation, _, rest = line.strip().partition(" ")
        target, *names = (part.strip() for part in rest.split(","))
        if operation in {"", ".reg"}:
            continue
        words = [value(name) for name in names]
        bf16 = "bf16x2" in operation
        match operation.split(".")[0]:
            case "shr":
                result = words[0] >> words[1]
            case "and":
                result = words[0] & words[1]
            case "mov":
                result = words[0]
            case "lop3":
                result = lop3(*words)
            case "fma":
                parts = zip(*(halves(word, bf16) for word in words), strict=True)
                result = sum(to_half(x * y + z, bf16) << 16 * place for place, (x, y, z) in enumerate(parts))
            case "add":
                parts = zip(*(halves(word, bf16) for word in words), strict=True)
                result = sum(to_half(x + y, bf16) << 16 * place for place, (x, y) in enumerate(parts))
            case _:
                raise AssertionError(f"{operation} is not known here")
        registers[target] = result
    return registers["$0"]


def packed_pair(rng, bits):
    """Draw two weights of each plane; return them, and the words that hold both, one of each slab."""
    tile = TILES[bits]
    q = [[rng.randrange(1 << bits) for _ in range(tile.planes)] for _ in range(2)]
    words = [0] * (tile.words // tile.lanes)
    for plane, low, width, slab, place in _fields(bits):
        for side in range(2):
            words[slab] |= (q[side][plane] >> low & (1 << width) - 1) << place + 16 * side
    return q, words


def inputs_of(bits, plane, words):
    return words if call("spread", bits, plane) else [words[call("slab_of", bits, plane)]]


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", TILES)
def test_decoded_fields(bits, bf16):
    """(OFFSET + factor * q) * UNIT, in one part or two, with and without shared shifts."""
    rng, offset, unit = random.Random(bits), call("offset_of", bits, bf16), call("unit_of", bf16)
    for _ in range(20):
        q, words = packed_pair(rng, bits)
        for plane in range(TILES[bits].planes):
            for paired in (True, False):
                sums = [0.0, 0.0]
                for part in range(call("parts_of", bits, bf16)):
                    word = run(call("_raw_asm", bits, plane, part, bf16, paired), inputs_of(bits, plane, words))
                    sums = [total + half for total, half in zip(sums, halves(word, bf16), strict=True)]
                factor = call("factor_of", bits, plane, paired)
                assert sums == [(offset + factor * side[plane]) * unit for side in q], (plane, paired)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits", TILES)
def test_weights_without_their_zero_point(bits, bf16):
    """(q - zero) * UNIT, for zero points that differ, and at 8 bits for the one that needs no subtraction."""
    rng, offset, unit = random.Random(bits), call("offset_of", bits, bf16), call("unit_of", bf16)
    for _ in range(20):
        q, words = packed_pair(rng, bits)
        for plane in range(TILES[bits].planes):
            for shifted in (True, False) if bits == 8 else (True,):
                zero = rng.randrange((1 << bits) + 1) if shifted else 128
                whole = call("parts_of", bits, bf16) == 1
                minus = -(zero + offset / call("factor_of", bits, plane)) * unit if whole else 128.0 - zero
                last = to_half(minus, bf16) * 0x10001
                code = call("_centred_asm", bits, plane, bf16, shifted)
                word = run(code, [*inputs_of(bits, plane, words), last])
                assert halves(word, bf16) == [(side[plane] - zero) * unit for side in q], (plane, zero)
