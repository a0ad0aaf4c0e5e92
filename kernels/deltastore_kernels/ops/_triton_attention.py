"""Softmax attention in Triton, block of tokens by block of tokens; decode, extend and the shared prefix are made of it.

What runs along is (out [R, D], top [R], total [R]) float32: `out / total` is the softmax-weighted sum of the values so
far, and log2(sum of exp(score)) = top + log2(total). Masked tokens are -inf, tops never: no NaN comes up.

**Integers.** In decode, levels (int8) meet a query of 15 bits, and values weights of 15 bits, in int8 dot products:
a matrix unit takes 16 rows, a group of query heads fills 8 at most, so upper and lower 7 bits of a row go in together
(`_stack`) and meet again in the same lanes. Floats (frames, sinks, raw pages) go the same way, as two halves.
Unpacking stays at a byte for each code, and a query loses 2**-15 of its largest dim.

**A value's scale** is added to its token's score as log2: weights then are what multiplies levels, their largest is
known, and rounding them to a part of it is an error relative to the largest contribution.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import key_levels, load_codes, load_scales, storage_order, unit_log2, value_levels

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)
"""A top before there is any token."""

_STEPS = tl.constexpr(127.0 * 128)
"""Largest whole number of a query's dim or of a weight, its lower 7 bits apart."""
_ROUND = tl.constexpr(8388608.0)
"""2**23: a float32 sum with it has the rounded other number in its lowest bits."""
HALF_GAIN = tl.constexpr(16384.0)
"""Weights as float16 are multiplied by it: they then go down to 2**-38 of the largest."""
_FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def _stack(upper, lower):
    """Two [R, N] -> [2 R, N]: 8 rows of one, the same 8 of the other; a lane of a matrix unit then has both."""
    ROWS: tl.constexpr = upper.shape[0]
    COUNT: tl.constexpr = upper.shape[1]
    both = tl.reshape(tl.join(upper, lower), (ROWS // 8, 8, COUNT, 2))
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), (2 * ROWS, COUNT))


@triton.jit
def _unstack(both):
    """Inverse of `_stack`."""
    ROWS: tl.constexpr = both.shape[0] // 2
    COUNT: tl.constexpr = both.shape[1]
    apart = tl.permute(tl.reshape(both, (ROWS // 8, 2, 8, COUNT)), (0, 2, 3, 1))
    return tl.split(tl.reshape(apart, (ROWS, COUNT, 2)))


@triton.jit
def query_as_integers(query):
    """query [R, D] float32 -> [2 R, D] int8 for `attend_packed`, and its unit [R] float32."""
    largest = tl.maximum(tl.max(tl.abs(query), 1), 1.0e-30)
    whole = tl.floor(query * (1.0 / largest * _STEPS)[:, None] + 0.5).to(tl.int32)
    return _stack((whole >> 7).to(tl.int8), (whole & 127).to(tl.int8)), largest * (1.0 / _STEPS)


@triton.jit
def _power_below(x):
    """x [R] float32 > 0 -> 2**floor(log2 x) and its reciprocal, exactly: their exponent bits."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def query_as_halves(query):
    """query [R, D] float32 -> [2 R, D] float16 for `attend_halves`, and its unit [R] float32."""
    unit, reciprocal = _power_below(tl.maximum(tl.max(tl.abs(query), 1), 1.0e-30))
    scaled = query * reciprocal[:, None]
    upper = scaled.to(tl.float16)
    return _stack(upper, (scaled - upper.to(tl.float32)).to(tl.float16)), unit


@triton.jit
def query_as_float16(query):
    """query [R, D] float32 -> [R, D] float16, exact for what was bfloat16 or float16, and its unit [R] float32."""
    unit, reciprocal = _power_below(tl.maximum(tl.max(tl.abs(query), 1), 1.0e-30))
    return (query * reciprocal[:, None]).to(tl.float16), unit


@triton.jit
def load_query(query, query_row, exists, dims, HEAD_DIM: tl.constexpr):
    """Rows [R] of query [rows, D] in the order of dims [D] -> [R, D] float32, zeros for rows that are none."""
    offset = query_row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    return tl.load(query + offset, mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def score_unit(unit, scale, SOFT_CAP: tl.constexpr):
    """What `_scores` multiplies dot products with: units of log2 without a cap, natural ones with it."""
    return unit * scale if SOFT_CAP > 0 else unit * (scale * LOG2_E)


@triton.jit
def _scores(dots, unit, SOFT_CAP: tl.constexpr):
    """Dot products [R, N] float32, unit [R] -> scores in units of log2."""
    scores = dots * unit[:, None]
    if SOFT_CAP > 0:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1)
        scores = (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / SOFT_CAP)) + 1)) * (SOFT_CAP * LOG2_E)
    return scores


@triton.jit
def no_tokens(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(out, top, total) before the first block."""
    return (
        tl.zeros((ROWS, HEAD_DIM), tl.float32),
        tl.full((ROWS,), LOWEST, tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )


@triton.jit
def finish(out, top, total):
    """-> softmax-weighted sum [R, D], and log2(sum of exp(score)) [R]; zeros and -inf where there was no token."""
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    return out / divisor[:, None], tl.where(seen, top + tl.log2(divisor), float("-inf"))


@triton.jit
def tile_pages(pages, table_row, tile, exists, PAGE: tl.constexpr):
    """Tiles [N] of a request, and which of them to touch -> pointers [N] to their pages."""
    page = tl.load(table_row + tile // PAGE.tiles, mask=exists, other=0).to(tl.int64)  # ids * bytes exceed 32 bits
    return tl.multiple_of(pages + page * PAGE.page_bytes, 16)


@triton.jit
def load_tiles(
    page,
    tile,
    exists,
    head,
    PAGE: tl.constexpr,
):
    """Tiles [N] in pages [N] (pointers) of one KV head -> packed keys, packed values (`load_codes`), and log2 of key
    and value scales times LEVEL_UNIT [N * 16] (`load_scales`)."""
    place = head * PAGE.tiles + tile % PAGE.tiles
    key = load_codes(page + place * (2 * PAGE.head_dim * PAGE.key_bits), exists, PAGE.key_bits, PAGE.head_dim)
    value = load_codes(
        page + (PAGE.value_offset + place * (2 * PAGE.head_dim * PAGE.value_bits)),
        exists,
        PAGE.value_bits,
        PAGE.head_dim,
    )
    key_log2, value_log2 = load_scales(
        page + (PAGE.scales_offset + place * 16),
        page + (PAGE.anchors_offset + place * 2),
        exists,
        unit_log2(PAGE.key_bits),
        unit_log2(PAGE.value_bits),
    )
    return key, value, key_log2, value_log2


@triton.jit
def load_raw_tiles(page, tile, visible, head, PAGE: tl.constexpr):
    """Tiles [N] of raw pages -> keys and values [N * 16, D] float16, zeros but for visible [N * 16] tokens."""
    TOKENS: tl.constexpr = visible.shape[0]
    place = head * PAGE.tiles + tile % PAGE.tiles
    rows = page + place * (16 * PAGE.head_dim * 2)
    token = tl.arange(0, 16) * (PAGE.head_dim * 2)
    rows = tl.multiple_of(tl.reshape(rows[:, None] + token[None, :], (TOKENS,)), 16)
    return (
        _load_rows(rows.to(tl.pointer_type(tl.float16)), visible, PAGE.head_dim),
        _load_rows((rows + PAGE.value_offset).to(tl.pointer_type(tl.float16)), visible, PAGE.head_dim),
    )


@triton.jit
def _load_rows(rows, visible, HEAD_DIM: tl.constexpr):
    """rows [N] pointers -> [N, D] float16 within its range, zeros where not visible."""
    loaded = tl.load(rows[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask=visible[:, None], other=0.0)
    if loaded.dtype == tl.float16:
        return loaded
    else:
        wide = loaded.to(tl.float32)
        return tl.minimum(tl.maximum(wide, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)


@triton.jit
def load_raw_rows(keys, values, row, stride, visible, HEAD_DIM: tl.constexpr):
    """Rows [N] int of two tensors with `stride` elements between rows -> [N, D] float16 each."""
    offset = row.to(tl.int64) * stride
    return _load_rows(keys + offset, visible, HEAD_DIM), _load_rows(values + offset, visible, HEAD_DIM)


@triton.jit
def attend_packed(
    out,
    top,
    total,
    query,
    unit,
    packed,
    mask,
    PAGE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """One block of N packed tokens, in integers.

    query [2 R, D in storage order] int8 and unit [R] (of `score_unit`); packed of `load_tiles`; mask [1, N] or [R, N]
    bool.
    """
    key, value, key_log2, value_log2 = packed
    upper, lower = _unstack(tl.dot(query, key_levels(key, PAGE.key_bits, USE_ASM)))
    dots = (upper * 128 + lower).to(tl.float32) * tl.exp2(key_log2)[None, :]
    # Masked before it is added: a [1, N] mask then costs nothing for each score.
    shift = tl.where(mask, value_log2[None, :], float("-inf"))
    scores = _scores(dots, unit, SOFT_CAP) + shift
    block_top = tl.maximum(tl.max(scores, 1), LOWEST)
    weights = tl.exp2(scores - block_top[:, None])
    block_total = tl.sum(weights * tl.exp2(-value_log2)[None, :], 1)
    whole = (weights * _STEPS + _ROUND).to(tl.int32, bitcast=True)
    steps = _stack(((whole >> 7) & 127).to(tl.int8), (whole & 127).to(tl.int8))
    upper, lower = _unstack(
        tl.dot(storage_order(steps, PAGE.value_bits), value_levels(value, PAGE.value_bits, USE_ASM))
    )
    new_top = tl.maximum(top, block_top)
    keep, gain = tl.exp2(top - new_top), tl.exp2(block_top - new_top)
    block_out = (upper * 128 + lower).to(tl.float32)
    return (
        out * keep[:, None] + block_out * (gain * (1.0 / _STEPS))[:, None],
        new_top,
        total * keep + block_total * gain,
    )


@triton.jit
def attend_halves(out, top, total, query, unit, key, value, mask, SOFT_CAP: tl.constexpr):
    """One block of N raw tokens. query [2 R, D] float16, key, value [N, D] float16, mask [1, N] or [R, N] bool."""
    upper, lower = _unstack(tl.dot(query, tl.trans(key)))
    weights, top, keep = _weights(tl.where(mask, _scores(upper + lower, unit, SOFT_CAP), float("-inf")), top)
    gained = weights * HALF_GAIN
    half = gained.to(tl.float16)
    upper, lower = _unstack(tl.dot(_stack(half, (gained - half.to(tl.float32)).to(tl.float16)), value))
    return out * keep[:, None] + (upper + lower) * (1 / HALF_GAIN), top, total * keep + tl.sum(weights, 1)


@triton.jit
def attend_many_packed(
    out,
    top,
    total,
    query,
    unit,
    packed,
    mask,
    PAGE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """`attend_packed` for so many rows that unpacking does not count: query [R, D in storage order] float16, and
    weights rounded to it. `out` is HALF_GAIN times too large, here and in `attend_many`."""
    key, value, key_log2, value_log2 = packed
    levels = key_levels(key, PAGE.key_bits, USE_ASM, tl.float16)
    dots = tl.dot(query, levels) * tl.exp2(key_log2)[None, :]
    scores = _scores(dots, unit, SOFT_CAP) + value_log2[None, :]
    weights, top, keep = _weights(tl.where(mask, scores, float("-inf")), top)
    gained = storage_order((weights * HALF_GAIN).to(tl.float16), PAGE.value_bits)
    out = tl.dot(gained, value_levels(value, PAGE.value_bits, USE_ASM, tl.float16), out * keep[:, None])
    return out, top, total * keep + tl.sum(weights * tl.exp2(-value_log2)[None, :], 1)


@triton.jit
def attend_many(out, top, total, query, unit, key, value, mask, SOFT_CAP: tl.constexpr):
    """`attend_halves` for many rows: query [R, D] float16, weights rounded to it."""
    scores = _scores(tl.dot(query, tl.trans(key)), unit, SOFT_CAP)
    weights, top, keep = _weights(tl.where(mask, scores, float("-inf")), top)
    out = tl.dot((weights * HALF_GAIN).to(tl.float16), value, out * keep[:, None])
    return out, top, total * keep + tl.sum(weights, 1)


@triton.jit
def _weights(scores, top):
    """-> weights [R, N] relative to the new top, the new top [R], and what is left of the old [R]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    return tl.exp2(scores - new_top[:, None]), new_top, tl.exp2(top - new_top)


@triton.jit
def attend_raw(out, top, total, query, unit, key, value, mask, SOFT_CAP: tl.constexpr, MANY: tl.constexpr):
    """One block of raw tokens for the query of `query_as_floats`."""
    if MANY:
        return attend_many(out, top, total, query, unit, key, value, mask, SOFT_CAP)
    else:
        return attend_halves(out, top, total, query, unit, key, value, mask, SOFT_CAP)


@triton.jit
def query_as_floats(query, MANY: tl.constexpr):
    """query [R, D] float32 -> what `attend_raw` takes, and its unit [R] float32."""
    if MANY:
        return query_as_float16(query)
    else:
        return query_as_halves(query)


@triton.jit
def attend_sink_and_frame(
    out,
    top,
    total,
    query,
    unit,
    sink_key,  # [slots, H, SINKS, D] float16
    sink_value,
    sink,
    sunk,
    frame_key,  # [frames, H, 16, D] float16
    frame_value,
    frame,
    frame_begin,
    in_frame,
    head,
    first,  # [R] or [1] position that a row still sees
    PAGE: tl.constexpr,
    SINKS: tl.constexpr,
    SINK_ROWS: tl.constexpr,  # a power of two, at least 16 and SINKS
    SOFT_CAP: tl.constexpr,
    MANY: tl.constexpr,
):
    """A request's raw tokens: positions 0 .. sunk - 1 and frame_begin .. frame_begin + in_frame - 1."""
    if SINKS > 0:
        token = tl.arange(0, SINK_ROWS)
        visible = token < sunk
        row = (sink.to(tl.int64) * PAGE.heads + head) * SINKS + token
        key, value = load_raw_rows(sink_key, sink_value, row, PAGE.head_dim, visible, PAGE.head_dim)
        mask = visible[None, :] & (token[None, :] >= first[:, None])
        out, top, total = attend_raw(out, top, total, query, unit, key, value, mask, SOFT_CAP, MANY)
    frame_token = tl.arange(0, 16)
    in_use = frame_token < in_frame
    row = (frame.to(tl.int64) * PAGE.heads + head) * 16 + frame_token
    frame_keys, frame_values = load_raw_rows(frame_key, frame_value, row, PAGE.head_dim, in_use, PAGE.head_dim)
    mask = in_use[None, :] & (frame_begin + frame_token[None, :] >= first[:, None])
    return attend_raw(out, top, total, query, unit, frame_keys, frame_values, mask, SOFT_CAP, MANY)


@triton.jit
def attend_tiles(
    out,
    top,
    total,
    query,  # [R, D in storage order] float32
    scale,
    pages,
    table_row,
    head,
    begin,
    end,
    hidden,  # tokens before it are seen by no row
    first,  # [R] position that a row still sees, looked at if BY_ROW
    PAGE: tl.constexpr,
    TILES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BY_ROW: tl.constexpr,
    MANY: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Tiles begin .. end - 1 of a request, TILES at a time."""
    if PAGE.key_bits == 16 or MANY:
        vectors, unit = query_as_floats(query, MANY)
    else:
        vectors, unit = query_as_integers(query)
    unit = score_unit(unit, scale, SOFT_CAP)
    for block in tl.range(begin, end, TILES):
        tile = block + tl.arange(0, TILES)
        exists = tile < end
        token = tl.reshape(tile[:, None] * 16 + tl.arange(0, 16)[None, :], (TILES * 16,))
        visible = (token < end * 16) & (token >= hidden)
        mask = visible[None, :]
        if BY_ROW:
            mask = mask & (token[None, :] >= first[:, None])
        page = tile_pages(pages, table_row, tile, exists, PAGE)
        if PAGE.key_bits == 16:
            key, value = load_raw_tiles(page, tile, visible, head, PAGE)
            out, top, total = attend_raw(out, top, total, vectors, unit, key, value, mask, SOFT_CAP, MANY)
        else:
            packed = load_tiles(page, tile, exists, head, PAGE)
            if MANY:
                out, top, total = attend_many_packed(
                    out, top, total, vectors, unit, packed, mask, PAGE, SOFT_CAP, USE_ASM
                )
            else:
                out, top, total = attend_packed(out, top, total, vectors, unit, packed, mask, PAGE, SOFT_CAP, USE_ASM)
    return out, top, total
