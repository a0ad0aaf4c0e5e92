"""What the Triton kernels share: a page's fields, codes to levels, scales.

**Storage order.** A packed word holds 8 codes (4 bits) or 16 (2 or 3 bits) that lie along the axis a dot product sums
over: dims of a key, tokens of a value. Byte permutes look up four codes at once, but give a word's first and second
half of them interleaved. They are not put back: a dot product does not care, so the other factor (query or
probabilities) takes the same order, once, with `storage_order`.

Levels are int8 by construction (codec.py), and stay it: the dot products are integers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from .. import codec
from ..layout import ANCHOR_BIAS, ANCHORS_PER_OCTAVE, SCALE_STEP_LOG2, PageLayout
from ._triton_asm import BITS_2, BITS_3_HIGH, BITS_3_LOW, BITS_4, TO_FLOAT16


def _word(levels: tuple[int, ...]) -> int:
    """Four int8 levels as a signed 32-bit word, the first in the lowest byte."""
    return int.from_bytes(bytes(level & 255 for level in levels), "little", signed=True)


_LEVELS_2 = tl.constexpr(_word(codec.LEVELS_INT8[2]))
_LEVELS_3_LOW = tl.constexpr(_word(codec.LEVELS_INT8[3][:4]))
_LEVELS_3_HIGH = tl.constexpr(_word(codec.LEVELS_INT8[3][4:]))
_LEVELS_4_0 = tl.constexpr(_word(codec.LEVELS_INT8[4][:4]))
_LEVELS_4_1 = tl.constexpr(_word(codec.LEVELS_INT8[4][4:8]))
_LEVELS_4_2 = tl.constexpr(_word(codec.LEVELS_INT8[4][8:12]))
_LEVELS_4_3 = tl.constexpr(_word(codec.LEVELS_INT8[4][12:]))
_ASM_2 = tl.constexpr(BITS_2)
_ASM_3_LOW = tl.constexpr(BITS_3_LOW)
_ASM_3_HIGH = tl.constexpr(BITS_3_HIGH)
_ASM_4 = tl.constexpr(BITS_4)
_ASM_TO_FLOAT16 = tl.constexpr(TO_FLOAT16)
_ANCHOR_BIAS = tl.constexpr(float(ANCHOR_BIAS))
_ANCHOR_STEP_LOG2 = tl.constexpr(1.0 / ANCHORS_PER_OCTAVE)
_NIBBLE_STEP_LOG2 = tl.constexpr(SCALE_STEP_LOG2)
_UNIT_LOG2_2 = tl.constexpr(math.log2(codec.LEVEL_UNIT[2]))
_UNIT_LOG2_3 = tl.constexpr(math.log2(codec.LEVEL_UNIT[3]))
_UNIT_LOG2_4 = tl.constexpr(math.log2(codec.LEVEL_UNIT[4]))


@dataclass(frozen=True)
class PageConstants:
    """The compile-time numbers of a layout that every kernel over pages takes, as one tl.constexpr; offsets and
    page_bytes in bytes."""

    key_bits: int
    value_bits: int
    heads: int
    head_dim: int
    tiles: int
    page_bytes: int
    value_offset: int
    scales_offset: int
    anchors_offset: int

    @classmethod
    @cache
    def of(cls, layout: PageLayout) -> PageConstants:
        offsets = layout.field_offsets_bytes
        return cls(
            layout.format.key_bits,
            layout.format.value_bits,
            layout.num_kv_heads,
            layout.head_dim,
            layout.tiles,
            layout.page_bytes,
            *(offsets[field][0] for field in ("value_codes", "scales", "anchors")),
        )


def use_asm(tensor: torch.Tensor) -> bool:
    """Whether a kernel on this tensor's device may use NVIDIA's byte permutes.

    Raises RuntimeError for a tensor on the CPU outside Triton's interpreter.
    """
    if not tensor.is_cuda and not interpreted():
        raise RuntimeError(
            f"a Triton kernel was given a tensor on {tensor.device}; it needs a GPU, or TRITON_INTERPRET=1 in the "
            "environment before Python starts; on a CPU use ops.load('cpu')"
        )
    return tensor.is_cuda and torch.version.hip is None


@cache
def generation(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU (9: Hopper), 0 for anything else: what launch options depend on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device's tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def storage_order(x, BITS: tl.constexpr):
    """x [R, N], N dims of keys or tokens of values of this many bits in their natural order -> in storage order,
    which for raw ones (16) is the natural one."""
    if BITS == 16:
        return x
    else:
        PERIOD: tl.constexpr = 8 if BITS == 4 else 16
        ROWS: tl.constexpr = x.shape[0]
        COUNT: tl.constexpr = x.shape[1]
        grouped = tl.reshape(x, (ROWS, COUNT // PERIOD, 2, PERIOD // 2))
        return tl.reshape(tl.permute(grouped, (0, 1, 3, 2)), (ROWS, COUNT))


@triton.jit
def storage_index(COUNT: tl.constexpr, BITS: tl.constexpr):
    """[COUNT] int32: natural index of each place in storage order."""
    return tl.reshape(storage_order(tl.arange(0, COUNT)[None, :], BITS), (COUNT,))


@triton.jit
def load_codes(codes, mask, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """codes [N] pointers to the codes of tiles, mask [N] which to read -> packed bytes, three tensors [N, bytes] uint8.

    2 and 4 bits fill the first. 3 bits: the even and the odd registers of the 2-bit plane, then the 1-bit plane.
    """
    if BITS == 3:
        i = tl.arange(0, HEAD_DIM * 2)
        two_bits = (i // 64) * 128 + i % 64
        even = tl.load(codes[:, None] + two_bits[None, :], mask=mask[:, None], other=0)
        odd = tl.load(codes[:, None] + (two_bits + 64)[None, :], mask=mask[:, None], other=0)
        low = tl.load(codes[:, None] + (HEAD_DIM * 4 + i)[None, :], mask=mask[:, None], other=0)
        return even, odd, low
    else:
        packed = tl.load(codes[:, None] + tl.arange(0, HEAD_DIM * 2 * BITS)[None, :], mask=mask[:, None], other=0)
        return packed, packed, packed


@triton.jit
def key_levels(packed, BITS: tl.constexpr, USE_ASM: tl.constexpr, DTYPE: tl.constexpr = tl.int8):
    """What `load_codes` gave of N tiles -> levels [D in storage order, N * 16 tokens], int8 or float16."""
    TILES: tl.constexpr = packed[0].shape[0]
    WORDS: tl.constexpr = packed[0].shape[1] // 64
    if BITS == 4:
        levels = tl.reshape(_levels_4(packed[0], USE_ASM, DTYPE), (TILES, WORDS, 16, 2, 2, 2))
        return tl.reshape(tl.permute(levels, (1, 5, 3, 4, 0, 2)), (WORDS * 8, TILES * 16))
    elif BITS == 2:
        levels = tl.reshape(_levels_2(packed[0], USE_ASM, DTYPE), (TILES, WORDS, 16, 4, 4))
        return tl.reshape(tl.permute(levels, (1, 4, 3, 0, 2)), (WORDS * 16, TILES * 16))
    else:
        levels = tl.reshape(_levels_3(packed, USE_ASM, DTYPE), (TILES, WORDS, 16, 4, 4, 2))
        return tl.reshape(tl.permute(levels, (1, 5, 4, 3, 0, 2)), (WORDS * 32, TILES * 16))


@triton.jit
def value_levels(packed, BITS: tl.constexpr, USE_ASM: tl.constexpr, DTYPE: tl.constexpr = tl.int8):
    """What `load_codes` gave of N tiles -> levels [N * 16 tokens, each tile's in storage order, D], int8 or float16."""
    TILES: tl.constexpr = packed[0].shape[0]
    WORDS: tl.constexpr = packed[0].shape[1] // 64
    if BITS == 4:
        levels = tl.reshape(_levels_4(packed[0], USE_ASM, DTYPE), (TILES, WORDS // 2, 2, 16, 2, 2, 2))
        return tl.reshape(tl.permute(levels, (0, 2, 6, 4, 5, 1, 3)), (TILES * 16, WORDS * 8))
    elif BITS == 2:
        levels = tl.reshape(_levels_2(packed[0], USE_ASM, DTYPE), (TILES, WORDS, 16, 4, 4))
        return tl.reshape(tl.permute(levels, (0, 4, 3, 1, 2)), (TILES * 16, WORDS * 16))
    else:
        levels = tl.reshape(_levels_3(packed, USE_ASM, DTYPE), (TILES, WORDS, 16, 4, 4, 2))
        return tl.reshape(tl.permute(levels, (0, 4, 3, 1, 5, 2)), (TILES * 16, WORDS * 32))


# Below, [N bytes] become [N / 4 words, ...]: first the byte of a result word, then which of its result words.
# j1 j0 are a byte's number in its word, h or k1 k0 a digit's number in its byte.


@triton.jit
def _levels_4(packed, USE_ASM: tl.constexpr, DTYPE: tl.constexpr):
    """[N tiles, bytes] -> [N * words, j0, h, j1]."""
    WORDS: tl.constexpr = packed.shape[0] * packed.shape[1] // 4
    if USE_ASM:
        low, high = tl.inline_asm_elementwise(
            _ASM_4, "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
        return tl.reshape(tl.join(_as(low, DTYPE), _as(high, DTYPE)), (WORDS, 2, 2, 2))
    else:
        code = packed.to(tl.int32)
        digits = tl.join(_level(code & 15, 4), _level(code >> 4, 4))
        return tl.permute(tl.reshape(digits.to(DTYPE), (WORDS, 2, 2, 2)), (0, 2, 3, 1))


@triton.jit
def _levels_2(packed, USE_ASM: tl.constexpr, DTYPE: tl.constexpr):
    """[N tiles, bytes] -> [N * words, (j0 k1), (k0 j1)]."""
    if USE_ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM_2,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        return _from_words(_as(a, DTYPE), _as(b, DTYPE), _as(c, DTYPE), _as(d, DTYPE))
    else:
        code = packed.to(tl.int32)
        return _from_digits(
            _level(code & 3, 2), _level((code >> 2) & 3, 2), _level((code >> 4) & 3, 2), _level(code >> 6, 2)
        ).to(DTYPE)


@triton.jit
def _levels_3(packed, USE_ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Three times [N tiles, bytes] -> [N * words, (j0 k1), (k0 j1), odd register]."""
    even, odd, low = packed
    if USE_ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM_3_LOW,
            "=&r,=&r,=&r,=&r,r,r",
            [even, low],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        e, f, g, h = tl.inline_asm_elementwise(
            _ASM_3_HIGH,
            "=&r,=&r,=&r,=&r,r,r",
            [odd, low],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        return tl.join(
            _from_words(_as(a, DTYPE), _as(b, DTYPE), _as(c, DTYPE), _as(d, DTYPE)),
            _from_words(_as(e, DTYPE), _as(f, DTYPE), _as(g, DTYPE), _as(h, DTYPE)),
        )
    else:
        one_bit = low.to(tl.int32)
        registers = _levels_3_register(even.to(tl.int32), one_bit), _levels_3_register(odd.to(tl.int32), one_bit >> 4)
        return tl.join(registers[0], registers[1]).to(DTYPE)


@triton.jit
def _as(levels, DTYPE: tl.constexpr):
    """What assembly gave, in words of four -> the same in DTYPE, in pairs."""
    if tl.int8 == DTYPE:
        return levels
    else:
        return tl.inline_asm_elementwise(_ASM_TO_FLOAT16, "=&r,=&r,r", [levels], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def _levels_3_register(two_bits, one_bit):
    return _from_digits(
        _level((two_bits & 3) * 2 + (one_bit & 1), 3),
        _level(((two_bits >> 2) & 3) * 2 + ((one_bit >> 1) & 1), 3),
        _level(((two_bits >> 4) & 3) * 2 + ((one_bit >> 2) & 1), 3),
        _level((two_bits >> 6) * 2 + ((one_bit >> 3) & 1), 3),
    )


@triton.jit
def _from_words(a, b, c, d):
    """Result words for (k0, j1) = 00, 01, 10, 11, bytes (j0 k1) -> [N * words, 4, 4]."""
    WORDS: tl.constexpr = a.shape[0] * a.shape[1] // 4
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (WORDS, 4, 4))


@triton.jit
def _from_digits(digit_0, digit_1, digit_2, digit_3):
    """Levels of each byte's four digits -> the same as `_from_words`."""
    WORDS: tl.constexpr = digit_0.shape[0] * digit_0.shape[1] // 4
    natural = tl.join(tl.join(digit_0, digit_2), tl.join(digit_1, digit_3))  # ..., k1, k0
    return tl.reshape(tl.permute(tl.reshape(natural, (WORDS, 2, 2, 2, 2)), (0, 2, 3, 4, 1)), (WORDS, 4, 4))


@triton.jit
def _level(code, BITS: tl.constexpr):
    """code int32 -> its level, int8: one byte of a constant."""
    if BITS == 2:
        word = tl.full(code.shape, _LEVELS_2, tl.int32)
    elif BITS == 3:
        word = tl.where(code < 4, _LEVELS_3_LOW, _LEVELS_3_HIGH)
    else:
        word = tl.where(
            code < 8, tl.where(code < 4, _LEVELS_4_0, _LEVELS_4_1), tl.where(code < 12, _LEVELS_4_2, _LEVELS_4_3)
        )
    return (word >> ((code & 3) * 8)).to(tl.int8)


@triton.jit
def unit_log2(BITS: tl.constexpr):
    """log2 of LEVEL_UNIT."""
    return _UNIT_LOG2_2 if BITS == 2 else (_UNIT_LOG2_3 if BITS == 3 else _UNIT_LOG2_4)


@triton.jit
def load_scales(scales, anchors, mask, key_unit_log2, value_unit_log2):
    """scales, anchors [N] pointers to fields of tiles, mask [N] -> log2 of key and value scales, [N * 16] float32 each,
    plus the given. What is not read is finite."""
    COUNT: tl.constexpr = scales.shape[0] * 16
    both = tl.load(scales[:, None] + tl.arange(0, 16)[None, :], mask=mask[:, None], other=0).to(tl.int32)
    key = (both & 15).to(tl.float32) * -_NIBBLE_STEP_LOG2 + _anchor_log2(anchors, mask, key_unit_log2)[:, None]
    value = (both >> 4).to(tl.float32) * -_NIBBLE_STEP_LOG2 + _anchor_log2(anchors + 1, mask, value_unit_log2)[:, None]
    return tl.reshape(key, (COUNT,)), tl.reshape(value, (COUNT,))


@triton.jit
def _anchor_log2(anchors, mask, unit_log2):
    anchor = tl.load(anchors, mask=mask, other=0).to(tl.float32)
    return (anchor - _ANCHOR_BIAS) * _ANCHOR_STEP_LOG2 + unit_log2


@triton.jit
def hadamard_rows(x, ROUNDS: tl.constexpr):
    """x [R, D] float32, ROUNDS = log2(D) -> each row times the Hadamard matrix of ones.

    Butterflies: a round takes neighbouring elements to their sum and difference and moves all sums before all
    differences. After log2(D) such rounds, all alike, every bit of the index has been the last one once and is back in
    its place.
    """
    ROWS: tl.constexpr = x.shape[0]
    HEAD_DIM: tl.constexpr = x.shape[1]
    for _ in tl.static_range(ROUNDS):
        even, odd = tl.split(tl.reshape(x, (ROWS, HEAD_DIM // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, HEAD_DIM))
    return x


@triton.jit
def model_dim(dims, DIM: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Stored dims -> which of the model's DIM lies there, and whether one does (basis.py: spread)."""
    if DIM == HEAD_DIM:
        return dims, dims < HEAD_DIM
    else:
        lies = (dims * DIM + (HEAD_DIM - 1)) // HEAD_DIM
        return lies, (lies < DIM) & (lies * HEAD_DIM // DIM == dims)
