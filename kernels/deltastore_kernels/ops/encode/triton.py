"""encode in Triton: one program for one tile of one KV head, which `encode_rows` makes bytes of; store_tokens too.

Products are rounded before they are added (no fused multiply-add), as the twin rounds them; sums over dims have another
order. Codes come from the codec's own tables.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ... import codec
from ...layout import (
    ANCHOR_BIAS,
    ANCHORS_PER_OCTAVE,
    NO_PAGE,
    SCALE_NIBBLES,
    SCALE_STEP_LOG2,
    TILE_TOKENS,
    Format,
    PageLayout,
)
from .._triton import PageConstants, use_asm

_SMALLEST = tl.constexpr(2.0**-40)  # as the twin's
_ANCHOR_BIAS = tl.constexpr(float(ANCHOR_BIAS))
_ANCHORS_PER_OCTAVE = tl.constexpr(float(ANCHORS_PER_OCTAVE))
_STEP_LOG2 = tl.constexpr(SCALE_STEP_LOG2)
_LAST_NIBBLE = tl.constexpr(SCALE_NIBBLES - 1.0)
_HALVES_MAX = tl.constexpr(codec.HALVES_MAX)
_NO_PAGE = tl.constexpr(NO_PAGE)
_FLOAT16_MAX = tl.constexpr(65504.0)
_HUGE_SCALE = tl.constexpr(codec.HUGE_SCALE)
_HUGE_RATIO = tl.constexpr(codec.HUGE_RATIO)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a sum with it has no fraction left


def encode(
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    page_ids: torch.Tensor,
    tile_ids: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    key_shaping: torch.Tensor | None = None,
) -> None:
    """See the twin. key_shaping whose transpose is contiguous, as basis.Basis lays it out on a GPU, is not copied."""
    use_asm(pages)
    if len(key_rot) == 0:
        return
    key, value = (side if side.stride(-1) == 1 else side.contiguous() for side in (key_rot, value_rot))
    shaped, heads = key_shaping is not None, layout.num_kv_heads
    own = shaped_at_once(len(key) * heads) if shaped else TILE_TOKENS
    encode_tile[(len(key), heads, TILE_TOKENS // own)](
        key,
        value,
        *key.stride()[:3],
        *value.stride()[:3],
        page_ids,
        tile_ids,
        pages,
        *tables(layout.format, key_shaping, pages.device),
        PAGE=PageConstants.of(layout),
        **halves(layout.format),
        SHAPED=shaped,
        OWN=own,
        **launch(layout.head_dim),
    )


FEW_TILES = 64
"""Of all heads: with four programs each, two warps for every scheduler of an H100."""


def shaped_at_once(tiles: int) -> int:
    """Tokens that one program shapes, of so many tiles of all heads: their dims come one after the other, which takes
    a quarter of a tile 0.4 of a tile's time, and four quarters 1.5 times its instructions (sm_90, head_dim 128)."""
    return TILE_TOKENS // 4 if tiles <= FEW_TILES else TILE_TOKENS


def tables(fmt: Format, key_shaping: torch.Tensor | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The tensors that `encode_rows` looks things up in: shaping, codes and levels of keys, codes and levels of
    values."""
    key_codes, key_levels = _tables(fmt.key_bits, device)
    shaping = key_levels if key_shaping is None else key_shaping.mT.contiguous()
    return shaping, key_codes, key_levels, *_tables(fmt.value_bits, device)


def launch(head_dim: int) -> dict[str, int | bool]:
    """Launch options of `encode_tile`."""
    return {"enable_fp_fusion": False, "num_warps": max(4, head_dim // 32)}


def halves(fmt: Format) -> dict[str, float]:
    """Compile-time numbers of half level units in a unit; raw pages have none."""
    sides = {"KEY_HALVES": fmt.key_bits, "VALUE_HALVES": fmt.value_bits}
    return {name: 0.0 if fmt.is_raw else 2 / codec.LEVEL_UNIT[bits] for name, bits in sides.items()}


@cache
@torch.inference_mode(False)
def _tables(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Code of each number of half level units (from -HALVES_MAX on) uint8, and level of each code float32."""
    codes = codec.codes_of_halves(bits) if bits in codec.LEVEL_UNIT else [0]
    levels = codec.levels(bits) if bits in codec.LEVEL_UNIT else [0.0]
    return torch.tensor(codes, dtype=torch.uint8, device=device), torch.tensor(levels, device=device)


@triton.jit
def encode_tile(
    key_rot,  # [N, H, 16, D], the last dim without gaps
    value_rot,
    key_stride_n,
    key_stride_head,
    key_stride_token,
    value_stride_n,
    value_stride_head,
    value_stride_token,
    page_ids,
    tile_ids,
    pages,
    key_shaping,  # [H, D, D] float32, transposed: row j holds what the error of dim j does to others
    key_codes,  # tables
    key_levels,
    value_codes,
    value_levels,
    PAGE: tl.constexpr,
    KEY_HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr,
    SHAPED: tl.constexpr,
    OWN: tl.constexpr,
):
    """Tile n of one head."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token, own = tl.arange(0, 16), own_tokens(OWN)
    keys = key_rot + n * key_stride_n + head * key_stride_head
    key_rows, own_rows = keys + token * key_stride_token, keys + own * key_stride_token
    value_rows = value_rot + n * value_stride_n + head * value_stride_head + token * value_stride_token
    encode_rows(
        key_rows, value_rows, key_rows, value_rows, token < 0, own_rows, own_rows, own < 0,
        tl.load(page_ids + n).to(tl.int64), tl.load(tile_ids + n).to(tl.int64), pages, head,
        key_shaping, key_codes, key_levels, value_codes, value_levels,
        PAGE, KEY_HALVES, VALUE_HALVES, SHAPED, OWN, False,
    )  # fmt: skip


@triton.jit
def own_tokens(OWN: tl.constexpr):
    """[OWN] int32: the tokens of a tile whose keys this program encodes."""
    return tl.program_id(2) * OWN + tl.arange(0, OWN)


@triton.jit
def encode_rows(
    key_rows,  # pointers [16] to a tile's tokens, the last dim without gaps
    value_rows,
    key_waiting,  # the same for those tokens that are taken from there
    value_waiting,
    waits,  # [16] bool: which
    own_key_rows,  # [OWN]: the keys' three again, of `own_tokens`
    own_key_waiting,
    own_waits,
    page_id,
    tile_id,
    pages,
    head,
    key_shaping,
    key_codes,
    key_levels,
    value_codes,
    value_levels,
    PAGE: tl.constexpr,
    KEY_HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr,
    SHAPED: tl.constexpr,
    OWN: tl.constexpr,
    ROUNDED: tl.constexpr,  # to float16 first, some tokens waiting as that
):
    """A tile of one head into its page, if it has one; of its keys those of `own_tokens`, 16 where they are not
    shaped."""
    part = tl.program_id(2)
    if page_id != _NO_PAGE:
        page = pages + page_id * PAGE.page_bytes
        place = head * PAGE.tiles + tile_id
        token, dim = tl.arange(0, 16), tl.arange(0, PAGE.head_dim)[None, :]
        key = _numbers(key_rows[:, None] + dim, key_waiting[:, None] + dim, waits[:, None], ROUNDED)
        value = _numbers(value_rows[:, None] + dim, value_waiting[:, None] + dim, waits[:, None], ROUNDED)
        if PAGE.key_bits == 16:
            row = (page + place * (32 * PAGE.head_dim)).to(tl.pointer_type(tl.float16))
            offset = token[:, None] * PAGE.head_dim + dim
            tl.store(row + offset, key.to(tl.float16))
            tl.store(row + PAGE.value_offset // 2 + offset, value.to(tl.float16))
        else:
            key_nearest, key_anchor = _round_scales(_rms(key, PAGE.head_dim))
            key_target = page + place * (2 * PAGE.head_dim * PAGE.key_bits)
            own = own_tokens(OWN)
            if SHAPED:
                codes, nibbles = _encode_shaped(
                    own_key_rows, own_key_waiting, own_waits, _those(key_nearest, own), key_anchor,
                    key_shaping + head * (PAGE.head_dim * PAGE.head_dim), key_codes, key_levels,
                    PAGE.head_dim, KEY_HALVES, ROUNDED,
                )  # fmt: skip
                _store_key(key_target + part * (4 * OWN), codes, PAGE.key_bits, PAGE.head_dim)
            else:
                codes, nibbles = _encode_plain(key, key_nearest, key_anchor, key_codes, key_levels, KEY_HALVES)
                _store_key(key_target, codes, PAGE.key_bits, PAGE.head_dim)

            rms = _rms(value, PAGE.head_dim)
            at_rms = tl.load(value_levels + _codes(value / rms[:, None], value_codes, VALUE_HALVES))
            unbiased = tl.sum(value * value, 1) / tl.maximum(tl.sum(value * at_rms, 1), _SMALLEST)
            unbiased = tl.maximum(unbiased, _SMALLEST)
            value_nibbles, value_anchor = _round_scales(unbiased)
            if part == 0:
                divisor = rms * _scale(value_nibbles, value_anchor) / unbiased
                digits = _codes(value / divisor[:, None], value_codes, VALUE_HALVES)
                target = page + (PAGE.value_offset + place * (2 * PAGE.head_dim * PAGE.value_bits))
                _store_value(target, digits, PAGE.value_bits, PAGE.head_dim)
                tl.store(page + (PAGE.anchors_offset + place * 2), key_anchor.to(tl.int32).to(tl.uint8))
                tl.store(page + (PAGE.anchors_offset + place * 2 + 1), value_anchor.to(tl.int32).to(tl.uint8))
            if OWN < 16:
                value_nibbles = _those(value_nibbles, own)
            both = nibbles.to(tl.int32) | (value_nibbles.to(tl.int32) << 4)
            tl.store(page + (PAGE.scales_offset + place * 16) + own, both.to(tl.uint8))


@triton.jit
def _numbers(x, waiting, waits, ROUNDED: tl.constexpr):
    """Pointers to new numbers, and to those that wait -> what the twin's encode sees of them, float32: ROUNDED, after
    packing.to_raw."""
    if ROUNDED:
        new = tl.load(x, mask=~waits, other=0.0).to(tl.float16)
        return finite(tl.where(waits, tl.load(waiting, mask=waits, other=0.0), new))
    else:
        return finite(tl.load(x))


@triton.jit
def finite(x):
    """packing.finite."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, 0.0)  # noqa: PLR0124  NaN alone differs from itself
    return tl.minimum(tl.maximum(x, -_FLOAT16_MAX), _FLOAT16_MAX)


@triton.jit
def _rms(x, HEAD_DIM: tl.constexpr):
    return tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1) * (1.0 / HEAD_DIM)), _SMALLEST)


@triton.jit
def _round(x):
    return (x + _ROUND) - _ROUND


@triton.jit
def _round_scales(scale):
    """scale [16] -> its nibbles [16] and the tile's anchor, whole float numbers."""
    log2_scale = tl.log2(scale)
    far_smaller = tl.sum((scale[:, None] > scale[None, :] * _HUGE_RATIO).to(tl.int32), 1)
    is_huge = (scale >= _HUGE_SCALE) & (far_smaller >= 8)  # half of the tile's tokens
    largest_log2 = tl.max(tl.where(is_huge, float("-inf"), log2_scale), 0)
    anchor = _round(largest_log2 * _ANCHORS_PER_OCTAVE + _ANCHOR_BIAS)
    anchor = tl.minimum(tl.maximum(anchor, 0.0), 255.0)
    steps_down = (_largest_log2(anchor) - log2_scale) * (1.0 / _STEP_LOG2)
    return tl.minimum(tl.maximum(_round(steps_down), 0.0), _LAST_NIBBLE), anchor


@triton.jit
def _largest_log2(anchor):
    return (anchor - _ANCHOR_BIAS) * (1.0 / _ANCHORS_PER_OCTAVE)


@triton.jit
def _scale(nibbles, anchor):
    """What decode makes of nibbles [R] and an anchor."""
    return tl.exp2(_largest_log2(anchor) - nibbles * _STEP_LOG2)


@triton.jit
def _codes(normalized, codes, HALVES: tl.constexpr):
    """Values in units of their scale -> codes, int32."""
    halves = tl.ceil(normalized * HALVES)
    halves = tl.where(halves != halves, 0.0, halves)  # noqa: PLR0124  no number: the middle, as the twin has it
    halves = tl.minimum(tl.maximum(halves, -1.0 * _HALVES_MAX), 1.0 * _HALVES_MAX)
    return tl.load(codes + (halves.to(tl.int32) + _HALVES_MAX)).to(tl.int32)


@triton.jit
def _try_nibble(nearest, step):
    return tl.minimum(tl.maximum(nearest + step, 0.0), _LAST_NIBBLE)


@triton.jit
def _encode_plain(key, nearest, anchor, code_table, level_table, HALVES: tl.constexpr):
    """key [16, D] -> codes int32, nibbles float32: the twin's `encode_keys` with `_nearest`."""
    codes, nibbles = tl.zeros(key.shape, tl.int32), nearest
    least = tl.full(nearest.shape, float("inf"), tl.float32)
    for candidate in tl.static_range(3):
        tried = _try_nibble(nearest, (0.0 if candidate == 0 else (-1.0 if candidate == 1 else 1.0)))
        scale = _scale(tried, anchor)
        tried_codes = _codes(key / scale[:, None], code_table, HALVES)
        error = tl.load(level_table + tried_codes) * scale[:, None] - key
        cost = tl.sum(error * error, 1)
        better = (cost < least) | (candidate == 0)
        codes = tl.where(better[:, None], tried_codes, codes)
        nibbles, least = tl.where(better, tried, nibbles), tl.where(better, cost, least)
    return codes, nibbles


@triton.jit
def _encode_shaped(
    key_rows, key_waiting, waits, nearest, anchor, shaping, code_table, level_table,
    HEAD_DIM: tl.constexpr, HALVES: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Tokens of a tile [R], as `encode_rows` has them -> codes [R, D] int32, nibbles [R] float32: the twin's
    `encode_keys` with `_shaped`.

    The three candidates of each token, and the first once more, are 4 R columns that go through the dims together:
    as columns, because a warp's lanes lie along the last axis and each step has one number for each of them.
    """
    TOKENS: tl.constexpr = nearest.shape[0]
    COLUMNS: tl.constexpr = 4 * TOKENS
    candidate = tl.arange(0, 4)
    step = tl.where(candidate == 1, -1.0, tl.where(candidate == 2, 1.0, 0.0))
    tried = _try_nibble(tl.broadcast_to(nearest[None, :], (4, TOKENS)), step[:, None])
    scale = tl.reshape(_scale(tried, anchor), (COLUMNS,))
    dims, word = tl.arange(0, HEAD_DIM), tl.arange(0, HEAD_DIM // 8)
    key = _numbers(key_rows[:, None] + dims[None, :], key_waiting[:, None] + dims[None, :], waits[:, None], ROUNDED)
    wanted = tl.reshape(tl.broadcast_to(tl.trans(key)[:, None, :], (HEAD_DIM, 4, TOKENS)), (HEAD_DIM, COLUMNS))
    key_rows = tl.reshape(tl.broadcast_to(key_rows[None, :], (4, TOKENS)), (COLUMNS,))
    key_waiting = tl.reshape(tl.broadcast_to(key_waiting[None, :], (4, TOKENS)), (COLUMNS,))
    waits = tl.reshape(tl.broadcast_to(waits[None, :], (4, TOKENS)), (COLUMNS,))
    cost = tl.zeros((COLUMNS,), tl.float32)
    words = tl.zeros((HEAD_DIM // 8, COLUMNS), tl.int32)  # eight codes to a word
    for dim in tl.range(HEAD_DIM):
        here = (dims == dim)[:, None]
        target = tl.sum(tl.where(here, wanted, 0.0), 0)
        code = _codes(target / scale, code_table, HALVES)
        level = tl.load(level_table + code) * scale
        missed = (level - target) * tl.load(shaping + dim * HEAD_DIM + dim)
        cost += missed * missed
        error = level - _numbers(key_rows + dim, key_waiting + dim, waits, ROUNDED)
        column = tl.load(shaping + dim * HEAD_DIM + dims, mask=dims > dim, other=0.0)
        wanted -= column[:, None] * error[None, :]
        words |= tl.where((word == dim // 8)[:, None], (code << (dim % 8 * 4))[None, :], 0)
    costs = tl.reshape(cost, (4, TOKENS))
    best, least = tl.zeros((TOKENS,), tl.int32), _of(costs, 0)
    for other in tl.static_range(1, 3):
        better = _of(costs, other) < least
        best, least = tl.where(better, other, best), tl.where(better, _of(costs, other), least)
    chosen = candidate[:, None] == best[None, :]
    words = tl.sum(tl.where(chosen[None, :, :], tl.reshape(words, (HEAD_DIM // 8, 4, TOKENS)), 0), 1)
    codes = (words[:, None, :] >> (tl.arange(0, 8) * 4)[None, :, None]) & 15
    return tl.trans(tl.reshape(codes, (HEAD_DIM, TOKENS))), tl.sum(tl.where(chosen, tried, 0.0), 0)


@triton.jit
def _of(costs, candidate):
    """Row `candidate` of costs [4, R]."""
    return tl.sum(tl.where((tl.arange(0, 4) == candidate)[:, None], costs, 0.0), 0)


@triton.jit
def _those(x, own):
    """x [16] float32 -> [R], of tokens `own`."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == own[:, None], x[None, :], 0.0), 1)


@triton.jit
def _store_key(target, codes, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """codes [R, D] int32 of neighbouring tokens -> their bytes of a tile (layout.py): one plane, or two for 3 bits."""
    if BITS == 3:
        _store_key_plane(target, codes >> 1, 2, HEAD_DIM)
        _store_key_plane(target + HEAD_DIM * 4, codes & 1, 1, HEAD_DIM)
    else:
        _store_key_plane(target, codes, BITS, HEAD_DIM)


@triton.jit
def _store_key_plane(target, digits, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    LINES: tl.constexpr = 8 // WIDTH
    REGISTERS: tl.constexpr = HEAD_DIM // (4 * LINES)
    line = tl.arange(0, LINES)[None, None, :, None]
    TOKENS: tl.constexpr = digits.shape[0]
    grouped = tl.reshape(digits, (TOKENS, REGISTERS, LINES, 4)) << (line * WIDTH)
    packed = tl.reshape(tl.sum(grouped, 2), (TOKENS, REGISTERS * 4))
    i = tl.arange(0, REGISTERS * 4)
    offset = tl.arange(0, TOKENS)[:, None] * 4 + ((i // 4) * 64 + i % 4)[None, :]
    tl.store(target + offset, packed.to(tl.uint8))


@triton.jit
def _store_value(target, codes, BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """As `_store_key`, of a whole tile."""
    if BITS == 3:
        _store_value_plane(target, codes >> 1, 2, HEAD_DIM)
        _store_value_plane(target + HEAD_DIM * 4, codes & 1, 1, HEAD_DIM)
    else:
        _store_value_plane(target, codes, BITS, HEAD_DIM)


@triton.jit
def _store_value_plane(target, digits, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    # Line 4 * (dim / 16) + token / 4, byte 4 * (dim % 16) + token % 4. A register has 8 / WIDTH lines: tokens first,
    # then neighbouring runs of 16 dims.
    LINES: tl.constexpr = 8 // WIDTH
    TOKEN_LINES: tl.constexpr = min(LINES, 4)
    DIM_LINES: tl.constexpr = LINES // TOKEN_LINES
    HALVES: tl.constexpr = 4 // TOKEN_LINES  # registers of the same dims
    RUNS: tl.constexpr = HEAD_DIM // (16 * DIM_LINES)
    token_line = tl.arange(0, TOKEN_LINES)[None, :, None, None]
    dim_line = tl.arange(0, DIM_LINES)[None, :, None]
    by_token = tl.reshape(digits, (HALVES, TOKEN_LINES, 4, HEAD_DIM)) << (token_line * WIDTH)
    by_dim = tl.reshape(tl.sum(by_token, 1), (HALVES * 4 * RUNS, DIM_LINES, 16)) << (dim_line * (TOKEN_LINES * WIDTH))
    packed = tl.reshape(tl.sum(by_dim, 1), (HALVES * 4, RUNS * 16))
    row, column = tl.arange(0, HALVES * 4), tl.arange(0, RUNS * 16)
    register = (column // 16)[None, :] * HALVES + (row // 4)[:, None]
    offset = register * 64 + (column % 16)[None, :] * 4 + (row % 4)[:, None]
    tl.store(target + offset, packed.to(tl.uint8))
