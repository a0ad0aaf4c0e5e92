"""attend_decode in Triton: split over the context, merged by log-sum-exp; what requests share is read once.

A program attends one KV head's group of query heads over its part of a request's tiles. Parts are as many as page
table and batch size allow, whatever the lengths are: nothing depends on values on the device, so a CUDA graph can hold
it. Part 0 also reads sinks and frame.

With `StepContext.shared`, programs of a second kind take the leading pages of a leader for the queries of all its
members at once, and a member's own parts begin behind them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ...context import LayerStore, Scoring, StepContext
from .._triton import generation, page_constants, storage_index, use_asm
from .._triton_attention import (
    LN_2,
    attend_sink_and_frame,
    attend_tiles,
    finish,
    load_query,
    no_tokens,
    query_as_floats,
    score_unit,
)

BLOCK_TILES = 4
"""Tiles of one step: 64 tokens."""
PROGRAMS_PER_MULTIPROCESSOR = 12
"""One-warp programs that fit, by their registers; more parts than fill the device would only have to be merged."""
MAX_PARTS = 64


class DecodePlan:
    """See the twin. What launches need beside tensors follows from shapes, and layers of one shape share it; no index
    is looked at."""

    def __init__(self, step: StepContext, bounds: LayerStore | None = None) -> None:
        self._step = step
        self._launches: dict[Hashable, _Launches] = {}

    def run(self, query_rot: torch.Tensor, layer: LayerStore, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
        """See the twin. Queries and weights are rounded to 15 bits each, of their largest in a row and block."""
        batch, query_heads, head_dim = query_rot.shape
        out_rot = torch.empty_like(query_rot, memory_format=torch.contiguous_format)
        lse = query_rot.new_empty(batch, query_heads, dtype=torch.float32)
        if batch == 0:
            return out_rot, lse
        query, step, shared = query_rot.contiguous(), self._step, self._step.shared
        launches = self._launches_of(query, layer, scoring)
        partial_out = query.new_empty((batch, query_heads, launches.all_parts, head_dim), dtype=torch.float32)
        partial_log2 = query.new_empty((batch, query_heads, launches.all_parts), dtype=torch.float32)
        stored = (
            query,
            partial_out,
            partial_log2,
            layer.pages,
            step.page_table,
            step.page_table.stride(0),
            step.packed_tokens,
            step.frame_tokens,
            step.sink_ids,
            step.packed_tokens if shared is None else shared.leader,
            step.packed_tokens if shared is None else shared.pages,
            scoring.scale,
        )
        frames = (layer.frame_key_rot, layer.frame_value_rot)
        sinks = (layer.sink_key_rot, layer.sink_value_rot) if layer.sink_tokens else frames
        attend_own[launches.own_grid](*stored, *frames, step.frame_ids, *sinks, **launches.own)
        if shared is not None:
            attend_shared[launches.shared_grid](*stored, batch, **launches.shared)
        merge_parts[(batch * query_heads,)](partial_out, partial_log2, out_rot, lse, **launches.merge)
        return out_rot, lse

    def _launches_of(self, query: torch.Tensor, layer: LayerStore, scoring: Scoring) -> _Launches:
        shape = (query.shape, query.device, layer.layout, layer.sink_tokens, scoring.soft_cap, scoring.window_left)
        if shape not in self._launches:
            self._launches[shape] = _launches(query, layer, scoring, self._step)
        return self._launches[shape]


@dataclass(frozen=True)
class _Launches:
    """Grids of the kernels, and what they are launched with beside tensors. `all_parts`: of each request's context,
    its own and those that others share."""

    all_parts: int
    own_grid: tuple[int, ...]
    own: dict[str, Any]
    shared_grid: tuple[int, ...]
    shared: dict[str, Any]
    merge: dict[str, Any]


def _launches(query: torch.Tensor, layer: LayerStore, scoring: Scoring, step: StepContext) -> _Launches:
    layout = layer.layout
    batch, query_heads, head_dim = query.shape
    heads, group = layout.num_kv_heads, query_heads // layout.num_kv_heads
    device = generation(query.device)
    launch, launch_shared = own_launch(group, head_dim, device), shared_launch(group, head_dim, device)
    chunks = triton.cdiv(batch, launch_shared["ROWS"] // group)
    parts = _parts(step, layer, batch, scoring.window_left)
    shared_parts = 0 if step.shared is None else _parts(step, layer, chunks * launch_shared["num_warps"], None)
    constants = {
        **page_constants(layout),
        "GROUP": group,
        "SINKS": layer.sink_tokens,
        "SOFT_CAP": scoring.soft_cap,
        "WINDOW_LEFT": -1 if scoring.window_left is None else scoring.window_left,
        "TILES": BLOCK_TILES,
        "ALL_PARTS": parts + shared_parts,
        "USE_ASM": use_asm(query),
    }
    sink_rows = max(16, triton.next_power_of_2(layer.sink_tokens))
    all_parts = parts + shared_parts
    return _Launches(
        all_parts,
        own_grid=(batch * heads, parts),
        own={**constants, "HAS_SHARED": step.shared is not None, "SINK_ROWS": sink_rows, "PARTS": parts, **launch},
        shared_grid=(batch * heads, chunks, shared_parts),
        shared={
            **constants, "BATCH": triton.next_power_of_2(batch), "FIRST_PART": parts, "PARTS": shared_parts,
            **launch_shared,
        },
        merge={
            "HEAD_DIM": head_dim, "PARTS": all_parts, "PARTS_PADDED": triton.next_power_of_2(all_parts), "num_warps": 1,
        },
    )  # fmt: skip


def own_launch(group: int, head_dim: int, device: int) -> dict[str, int]:
    """Rows and launch options of `attend_own` for a `generation` of device.

    One warp for the 16 rows of a matrix unit: no barrier, and no other warp unpacks the same.
    """
    rows = max(8, triton.next_power_of_2(group))
    warps = rows // 8 * (2 if head_dim == 256 else 1)
    launch = {"ROWS": rows, "num_warps": warps, "num_stages": 2}
    # Left alone, ptxas takes 168 registers there and spills; 10 warps of 200 fit a multiprocessor as well.
    return launch | ({"maxnreg": 200} if device == 10 and head_dim == 128 else {})


def shared_launch(group: int, head_dim: int, device: int) -> dict[str, int]:
    """As `own_launch`, of `attend_shared`: 32 rows are one of Hopper's matrix instructions, upper and lower halves
    together. Elsewhere 16, because Triton 3.8 fails to compile 32 for Blackwell's ("Illegal shared layout")."""
    rows = max(32 if device == 9 else 16, triton.next_power_of_2(group))
    return {"ROWS": rows, "num_warps": rows // 8 * (2 if head_dim == 256 else 1), "num_stages": 2}


def _parts(step: StepContext, layer: LayerStore, warps: int, window_left: int | None) -> int:
    """Parts of each request's context, for so many warps of each KV head and part: from shapes alone."""
    most_tokens = step.page_table.shape[1] * layer.layout.page_tokens
    if window_left is not None:
        most_tokens = min(most_tokens, window_left + 2 * 16)
    blocks = triton.cdiv(most_tokens, BLOCK_TILES * 16)
    programs = _multiprocessors(layer.pages.device) * PROGRAMS_PER_MULTIPROCESSOR
    wanted = triton.cdiv(programs, warps * layer.layout.num_kv_heads)
    return max(1, min(wanted, blocks, MAX_PARTS))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    SCALES_OFFSET: tl.constexpr,
    ANCHORS_OFFSET: tl.constexpr,
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
    request, head, part = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
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
    query_row = (request * HEADS + head) * GROUP + row
    firsts = first + tl.zeros((1,), tl.int32)
    out, top, total = no_tokens(ROWS, HEAD_DIM)
    if part == 0:
        rows = load_query(query, query_row, in_group, tl.arange(0, HEAD_DIM), HEAD_DIM)
        vectors, unit = query_as_floats(rows, False)
        out, top, total = attend_sink_and_frame(
            out, top, total, vectors, score_unit(unit, scale, SOFT_CAP), sink_key, sink_value, sink, sunk, frame_key,
            frame_value, tl.load(frame_ids + request), packed, in_frame, head, firsts,
            HEADS, HEAD_DIM, SINKS, SINK_ROWS, SOFT_CAP, False,
        )  # fmt: skip
    begin = first // 16
    if HAS_SHARED:
        begin = tl.maximum(begin, tl.load(shared_pages + request).to(tl.int32) * PAGE_TILES)
    begin, end = _part_of(begin, packed // 16, part, PARTS, TILES)
    if begin < end:
        rows = load_query(query, query_row, in_group, storage_index(HEAD_DIM, KEY_BITS), HEAD_DIM)
        out, top, total = attend_tiles(
            out, top, total, rows, scale, pages, page_table + request.to(tl.int64) * table_stride, head, begin, end,
            tl.maximum(first, sunk), firsts, KEY_BITS, VALUE_BITS, HEAD_DIM, PAGE_TILES, PAGE_BYTES, VALUE_OFFSET,
            SCALES_OFFSET, ANCHORS_OFFSET, TILES, SOFT_CAP, False, False, USE_ASM,
        )  # fmt: skip
    _store_part(out, top, total, partial_out, partial_log2, query_row, in_group, part, HEAD_DIM, ALL_PARTS)


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
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TILES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    SCALES_OFFSET: tl.constexpr,
    ANCHORS_OFFSET: tl.constexpr,
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
    request, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
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
        query_row = (member * HEADS + head) * GROUP + row % GROUP

        end = tl.load(shared_pages + request).to(tl.int32) * PAGE_TILES
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
        out, top, total = no_tokens(ROWS, HEAD_DIM)
        if begin < end:
            rows = load_query(query, query_row, in_group, storage_index(HEAD_DIM, KEY_BITS), HEAD_DIM)
            out, top, total = attend_tiles(
                out, top, total, rows, scale, pages, page_table + request.to(tl.int64) * table_stride, head, begin,
                end, sunk, first, KEY_BITS, VALUE_BITS, HEAD_DIM, PAGE_TILES, PAGE_BYTES, VALUE_OFFSET,
                SCALES_OFFSET, ANCHORS_OFFSET, TILES, SOFT_CAP, WINDOW_LEFT >= 0, False, USE_ASM,
            )  # fmt: skip
        _store_part(
            out, top, total, partial_out, partial_log2, query_row, in_group, FIRST_PART + part, HEAD_DIM, ALL_PARTS
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


@triton.jit
def merge_parts(
    partial_out,  # [rows, PARTS, D] float32
    partial_log2,  # [rows, PARTS] float32
    out,  # [rows, D]
    lse,  # [rows] float32
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):
    """One row's parts, weighted by their sums. Zeros and -inf where every part is empty."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_PADDED)
    sums = tl.load(partial_log2 + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    filled = sums > float("-inf")
    top = tl.max(tl.where(filled, sums, -1.0e30), 0)
    weights = tl.where(filled, tl.exp2(sums - top), 0.0)
    total = tl.sum(weights, 0)
    dim = tl.arange(0, HEAD_DIM)
    offset = (row * PARTS + part)[:, None] * HEAD_DIM + dim[None, :]
    parts = tl.load(partial_out + offset, mask=filled[:, None], other=0.0)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(parts * weights[:, None], 0) / divisor
    tl.store(out + row * HEAD_DIM + dim, merged.to(out.dtype.element_ty))
    tl.store(lse + row, tl.where(total > 0, (top + tl.log2(divisor)) * LN_2, float("-inf")))
