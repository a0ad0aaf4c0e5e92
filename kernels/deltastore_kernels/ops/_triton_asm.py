"""Byte permutes (PTX prmt) that turn packed codes into int8 levels, four at a time.

A permute's selector is four nibbles, each the number of one of eight bytes, so a packed word is a selector almost as
it lies: its low half chooses one result word, its high half another. Sorted tables come as immediates.
Instructions: 11 for 8 codes of 4 bits, 9 for 16 codes of 2 bits, 17 for 16 codes of 3 bits.

Results of a word with bytes j = 0..3 and digits k of a byte (bits 4k.. or 2k..):
    4 bits   $0 = j0 k0, j0 k1, j1 k0, j1 k1            $1 = the same of j2, j3
    2, 3     $0 = j0 k0, j0 k2, j1 k0, j1 k2            $1 = the same of j2, j3         $2, $3 = with k1, k3
"""

from __future__ import annotations

from .. import codec


def _table(bits: int) -> list[str]:
    """The levels as 32-bit immediates, four in each, the lowest code in the lowest byte."""
    levels = bytes(level & 255 for level in codec.LEVELS_INT8[bits])
    return [f"0x{int.from_bytes(levels[i : i + 4], 'little'):08x}" for i in range(0, len(levels), 4)]


def _bits_4() -> str:
    negative_low, negative_high, positive_low, positive_high = _table(4)
    return f"""{{
    .reg .b32 code, half, low, high;
    and.b32 code, $2, 0x77777777;
    shr.u32 half, $2, 1;
    lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 low, {negative_low}, {negative_high}, code;
    prmt.b32 high, {positive_low}, {positive_high}, code;
    prmt.b32 $0, low, high, half;
    shr.u32 code, code, 16;
    shr.u32 half, half, 16;
    prmt.b32 low, {negative_low}, {negative_high}, code;
    prmt.b32 high, {positive_low}, {positive_high}, code;
    prmt.b32 $1, low, high, half;
    }}"""


def _bits_2() -> str:
    (table,) = _table(2)
    return f"""{{
    .reg .b32 even, odd;
    and.b32 even, $4, 0x33333333;
    shr.u32 odd, $4, 2;
    and.b32 odd, odd, 0x33333333;
    prmt.b32 $0, {table}, {table}, even;
    prmt.b32 $2, {table}, {table}, odd;
    shr.u32 even, even, 16;
    shr.u32 odd, odd, 16;
    prmt.b32 $1, {table}, {table}, even;
    prmt.b32 $3, {table}, {table}, odd;
    }}"""


def _bits_3(shift: int) -> str:
    """$4 holds the upper two bits of 16 codes, $5 their lowest bit, four to a byte from bit `shift` on."""
    low, high = _table(3)
    return f"""{{
    .reg .b32 even, odd, bit, next;
    shr.u32 bit, $5, {shift};
    and.b32 bit, bit, 0x0f0f0f0f;
    shl.b32 next, bit, 2;
    or.b32 bit, bit, next;
    shl.b32 even, $4, 1;
    shr.u32 odd, $4, 1;
    shr.u32 next, bit, 1;
    and.b32 bit, bit, 0x11111111;
    and.b32 next, next, 0x11111111;
    lop3.b32 even, even, 0x66666666, bit, 0xEA;
    lop3.b32 odd, odd, 0x66666666, next, 0xEA;
    prmt.b32 $0, {low}, {high}, even;
    prmt.b32 $2, {low}, {high}, odd;
    shr.u32 even, even, 16;
    shr.u32 odd, odd, 16;
    prmt.b32 $1, {low}, {high}, even;
    prmt.b32 $3, {low}, {high}, odd;
    }}"""


# Four int8 -> two pairs of float16. 0x6400 | x is 1024 + x: with the sign bit turned over that is 1152 + level.
TO_FLOAT16 = """{
    .reg .b32 biased, bias;
    xor.b32 biased, $2, 0x80808080;
    mov.b32 bias, 0x64806480;
    prmt.b32 $0, biased, 0x64646464, 0x4140;
    prmt.b32 $1, biased, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
    }"""
# lop3 0xEA is (a & b) | c.
BITS_2, BITS_4 = _bits_2(), _bits_4()
BITS_3_LOW, BITS_3_HIGH = _bits_3(0), _bits_3(4)
