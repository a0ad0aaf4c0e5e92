"""attend_decode's kernels in Triton (attend_decode/triton.py launches them)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import storage_index
from ._triton_attention import (
    attend_sink_and_frame,
    attend_tiles,
    finish,
    load_query,
    no_tokens,
    query_as_floats,
    score_unit,
)


@triton.jit
def attend_own(
    query,  # [B, Hq, D]
    partial_out,  # [B, Hq, ALL_PARTS, D] float32
    partial_log2,  # [B, Hq, ALL_PARTS] float32
    pages,
    page_table,
    table_stride,
    packed_tokens,
    frame_tokens,
    sink_ids,
    leader,
    shared_pages,
    scale,
    frame_key,  # [frames, H, 16, D] float16
    frame_value,
    frame_ids,
    sink_key,  # [slots, H, SINKS, D] float16
    sink_value,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW_LEFT: tl.constexpr,  # -1: none
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr,
    USE_ASM: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    SINK_ROWS: tl.constexpr,  # a power of two, at least 16 and SINKS
    ROWS: tl.constexpr,  # a power of two, at least 8 and GROUP
):
    """A part of one request's own tiles for one KV head; part 0 its sink and frame too."""
    request, head, part = tl.program_id(0) // PAGE.heads, tl.program_id(0) % PAGE.heads, tl.program_id(1)
    packed = tl.load(packed_tokens + request).to(tl.int32)
    in_frame = tl.load(frame_tokens + request).to(tl.int32)
    first = 0  # token that the query still sees
    if WINDOW_LEFT >= 0:
        first = tl.maximum(packed + in_frame - 1 - WINDOW_LEFT, 0)
    sink, sunk = 0, 0  # tokens that are read from the sink
    if SINKS > 0:
        sink = tl.load(sink_ids + request)
        sunk = tl.where((sink >= 0) & (packed > 0), SINKS, 0)

    row = tl.arange(0, ROWS)
    in_group = row < GROUP
    query_row = (request * PAGE.heads + head) * GROUP + row
    firsts = first + tl.zeros((1,), tl.int32)
    out, top, total = no_tokens(ROWS, PAGE.head_dim)
    if part == 0:
        rows = load_query(query, query_row, in_group, tl.arange(0, PAGE.head_dim), PAGE.head_dim)
        vectors, unit = query_as_floats(rows, False)
        out, top, total = attend_sink_and_frame(
            out, top, total, vectors, score_unit(unit, scale, SOFT_CAP), sink_key, sink_value, sink, sunk, frame_key,
            frame_value, tl.load(frame_ids + request), packed, in_frame, head, firsts,
            PAGE, SINKS, SINK_ROWS, SOFT_CAP, False,
        )  # fmt: skip
    begin = first // 16
    if HAS_SHARED:
        begin = tl.maximum(begin, tl.load(shared_pages + request).to(tl.int32) * PAGE.tiles)
    begin, end = _part_of(begin, packed // 16, part, PARTS, TILES)
    if begin < end:
        rows = load_query(query, query_row, in_group, storage_index(PAGE.head_dim, PAGE.key_bits), PAGE.head_dim)
        out, top, total = attend_tiles(
            out, top, total, rows, scale, pages, page_table + request.to(tl.int64) * table_stride, head, begin, end,
            tl.maximum(first, sunk), firsts, PAGE, TILES, SOFT_CAP, False, False, USE_ASM,
        )  # fmt: skip
    _store_part(out, top, total, partial_out, partial_log2, query_row, in_group, part, PAGE.head_dim, ALL_PARTS)


@triton.jit
def attend_shared(
    query,
    partial_out,
    partial_log2,
    pages,
    page_table,
    table_stride,
    packed_tokens,
    frame_tokens,
    sink_ids,
    leader,
    shared_pages,
    scale,
    batch,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW_LEFT: tl.constexpr,
    TILES: tl.constexpr,
    FIRST_PART: tl.constexpr,  # behind those of `attend_own`
    PARTS: tl.constexpr,
    ALL_PARTS: tl.constexpr,
    USE_ASM: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,  # a power of two, at least batch
):
    """A part of one leader's shared tiles, one KV head, for ROWS // GROUP of its members: rows are their query heads.

    Writes every member's row of these parts, whoever its leader is: `request` counts leaders, and each leads itself.
    """
    request, head = tl.program_id(0) // PAGE.heads, tl.program_id(0) % PAGE.heads
    chunk, part = tl.program_id(1), tl.program_id(2)
    other = tl.arange(0, BATCH)
    led = tl.load(leader + other, mask=other < batch, other=-1).to(tl.int32) == request
    members = tl.sum(led.to(tl.int32), 0)
    first_member = chunk * (ROWS // GROUP)
    if first_member < members:
        # The n-th member is the request that is led and has n led ones before it.
        number = tl.cumsum(led.to(tl.int32), 0) - 1
        row = tl.arange(0, ROWS)
        wanted = first_member + row // GROUP
        in_group = (row < ROWS // GROUP * GROUP) & (wanted < members)
        chosen = led[None, :] & (number[None, :] == wanted[:, None])
        member = tl.sum(tl.where(chosen, other[None, :], 0), 1)
        query_row = (member * PAGE.heads + head) * GROUP + row % GROUP

        end = tl.load(shared_pages + request).to(tl.int32) * PAGE.tiles
        begin, first = 0, tl.zeros((ROWS,), tl.int32)
        if WINDOW_LEFT >= 0:
            length = tl.load(packed_tokens + member, mask=in_group, other=0).to(tl.int32)
            length += tl.load(frame_tokens + member, mask=in_group, other=0).to(tl.int32)
            first = tl.maximum(length - 1 - WINDOW_LEFT, 0)
            begin = tl.min(tl.where(in_group, first, end * 16), 0) // 16
        sunk = 0
        if SINKS > 0:
            # Members share their first page, and with it the sink.
            sunk = tl.where(tl.load(sink_ids + request) >= 0, SINKS, 0)
        begin, end = _part_of(begin, end, part, PARTS, TILES)
        out, top, total = no_tokens(ROWS, PAGE.head_dim)
        if begin < end:
            rows = load_query(query, query_row, in_group, storage_index(PAGE.head_dim, PAGE.key_bits), PAGE.head_dim)
            out, top, total = attend_tiles(
                out, top, total, rows, scale, pages, page_table + request.to(tl.int64) * table_stride, head, begin,
                end, sunk, first, PAGE, TILES, SOFT_CAP, WINDOW_LEFT >= 0, False, USE_ASM,
            )  # fmt: skip
        _store_part(
            out, top, total, partial_out, partial_log2, query_row, in_group, FIRST_PART + part, PAGE.head_dim, ALL_PARTS
        )


@triton.jit
def _part_of(begin, end, part, PARTS: tl.constexpr, TILES: tl.constexpr):
    """The part'th of PARTS equal runs of whole blocks from tile begin to tile end; may be empty."""
    blocks = tl.cdiv(tl.maximum(end - begin, 0), TILES)
    part_tiles = tl.cdiv(blocks, PARTS) * TILES
    part_begin = begin + part * part_tiles
    return part_begin, tl.minimum(part_begin + part_tiles, end)


@triton.jit
def _store_part(
    out, top, total, partial_out, partial_log2, query_row, in_group, part, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr
):
    """An empty part stores its -inf alone."""
    out, log2_sum = finish(out, top, total)
    slot = query_row.to(tl.int64) * PARTS + part
    tl.store(partial_log2 + slot, log2_sum, mask=in_group)
    filled = in_group & (total > 0)
    tl.store(partial_out + slot[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], out, mask=filled[:, None])
