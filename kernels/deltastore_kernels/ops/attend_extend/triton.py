"""attend_extend in Triton: blocks of query rows over sink, packed pages, frame and the new tokens.

A row is one query head of one new token: row r of a request is token r // group, head r % group of a KV head's group,
so that what is unpacked serves as many rows as a matrix unit likes. Queries and weights are rounded to float16.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ...context import LayerStore, Scoring, StepContext
from ...transfer import to_device
from .._triton import PageConstants, storage_index, use_asm
from .._triton_attention import (
    HALF_GAIN,
    LN_2,
    attend_many,
    attend_sink_and_frame,
    attend_tiles,
    finish,
    load_query,
    load_raw_rows,
    no_tokens,
    query_as_floats,
    score_unit,
)
from ..attend_decode.triton import block_tiles


class ExtendPlan:
    """See the twin. Once for all layers of one shape the host says which block of rows belongs to which request,
    and copies it to the device without waiting; no index is looked at."""

    def __init__(self, step: StepContext, new_tokens: Sequence[int], bounds: LayerStore | None = None) -> None:
        self._step, self._new_tokens = step, new_tokens
        self._blocks: dict[tuple[int, int], torch.Tensor] = {}
        self._constants: dict[Hashable, dict[str, Any]] = {}

    def run(
        self,
        query_rot: torch.Tensor,
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the twin."""
        tokens, query_heads, _ = query_rot.shape
        out_rot = torch.empty_like(query_rot, memory_format=torch.contiguous_format)
        lse = query_rot.new_empty(tokens, query_heads, dtype=torch.float32)
        if not tokens:
            return out_rot, lse
        step, group = self._step, query_heads // layer.layout.num_kv_heads
        shape = group, launch(layer.layout.head_dim)["ROWS"]
        if shape not in self._blocks:
            self._blocks[shape] = to_device(_blocks(self._new_tokens, *shape), query_rot.device)
        blocks = self._blocks[shape]
        frames = (layer.frame_key_rot, layer.frame_value_rot)
        attend_rows[(len(blocks), layer.layout.num_kv_heads)](
            blocks,
            query_rot.contiguous(),
            key_rot.contiguous(),
            value_rot.contiguous(),
            out_rot,
            lse,
            layer.pages,
            step.page_table,
            step.page_table.stride(0),
            step.packed_tokens,
            step.frame_tokens,
            *frames,
            step.frame_ids,
            *((layer.sink_key_rot, layer.sink_value_rot) if layer.sink_tokens else frames),
            step.sink_ids,
            scoring.scale,
            **self._constants_of(query_rot, layer, group, scoring),
        )
        return out_rot, lse

    def _constants_of(self, query_rot: torch.Tensor, layer: LayerStore, group: int, scoring: Scoring) -> dict[str, Any]:
        shape = (query_rot.device, layer.layout, layer.sink_tokens, group, scoring.soft_cap, scoring.window_left)
        if shape not in self._constants:
            self._constants[shape] = {
                "PAGE": PageConstants.of(layer.layout),
                "GROUP": group,
                "SINKS": layer.sink_tokens,
                "SINK_ROWS": max(16, triton.next_power_of_2(layer.sink_tokens)),
                "SOFT_CAP": scoring.soft_cap,
                "WINDOW_LEFT": -1 if scoring.window_left is None else scoring.window_left,
                "USE_ASM": use_asm(query_rot),
                **launch(layer.layout.head_dim),
            }
        return self._constants[shape]


def _blocks(new_tokens: Sequence[int], group: int, block_rows: int) -> torch.Tensor:
    """[blocks, 4] int32 on the host: see `attend_rows`."""
    blocks, begin = [], 0
    for request, count in enumerate(new_tokens):
        blocks += [(request, begin, count, row) for row in range(0, count * group, block_rows)]
        begin += count
    # The last blocks of long requests see most tokens: they start first.
    blocks.sort(key=lambda block: -block[3])
    return torch.tensor(blocks, dtype=torch.int32)


def launch(head_dim: int) -> dict[str, int]:
    """Rows and launch options of `attend_rows`."""
    rows = 64 if head_dim < 512 else 16
    return {"ROWS": rows, "TILES": block_tiles(head_dim), "num_warps": 4 if head_dim < 256 else 8, "num_stages": 1}


@triton.jit
def attend_rows(
    blocks,  # [blocks, 4] int32: request, its first new token, how many it has, first row of the block
    query,  # [T, Hq, D]
    new_key,  # [T, H, D]
    new_value,
    out,  # [T, Hq, D]
    lse,  # [T, Hq] float32
    pages,
    page_table,
    table_stride,
    packed_tokens,
    frame_tokens,
    frame_key,  # [frames, H, 16, D] float16
    frame_value,
    frame_ids,
    sink_key,  # [slots, H, SINKS, D] float16
    sink_value,
    sink_ids,
    scale,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    SINK_ROWS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW_LEFT: tl.constexpr,  # -1: none
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """One block of rows of one request and KV head."""
    block, head = tl.program_id(0) * 4, tl.program_id(1)
    request, begin = tl.load(blocks + block).to(tl.int64), tl.load(blocks + block + 1)
    count, first_row = tl.load(blocks + block + 2), tl.load(blocks + block + 3)
    packed = tl.load(packed_tokens + request).to(tl.int32)
    in_frame = tl.load(frame_tokens + request).to(tl.int32)
    old = packed + in_frame

    row = first_row + tl.arange(0, ROWS)
    new, exists = row // GROUP, row < count * GROUP
    position = old + new
    first = tl.zeros((ROWS,), tl.int32)  # position that a row still sees
    least_first = 0
    if WINDOW_LEFT >= 0:
        first = tl.maximum(position - WINDOW_LEFT, 0)
        least_first = tl.maximum(old + first_row // GROUP - WINDOW_LEFT, 0)
    query_row = ((begin + new).to(tl.int64) * PAGE.heads + head) * GROUP + row % GROUP
    natural = tl.arange(0, PAGE.head_dim)
    sink, sunk = 0, 0  # tokens that are read from the sink
    if SINKS > 0:
        sink = tl.load(sink_ids + request)
        sunk = tl.where((sink >= 0) & (packed > 0), SINKS, 0)

    out_sum, top, total = no_tokens(ROWS, PAGE.head_dim)
    begin_tile, end_tile = least_first // 16, packed // 16
    if begin_tile < end_tile:
        rows = load_query(query, query_row, exists, storage_index(PAGE.head_dim, PAGE.key_bits), PAGE.head_dim)
        out_sum, top, total = attend_tiles(
            out_sum, top, total, rows, scale, pages, page_table + request * table_stride, head, begin_tile, end_tile,
            sunk, first, PAGE, TILES, SOFT_CAP, WINDOW_LEFT >= 0, True, USE_ASM,
        )  # fmt: skip
    vectors, unit = query_as_floats(load_query(query, query_row, exists, natural, PAGE.head_dim), True)
    unit = score_unit(unit, scale, SOFT_CAP)
    out_sum, top, total = attend_sink_and_frame(
        out_sum, top, total, vectors, unit, sink_key, sink_value, sink, sunk, frame_key, frame_value,
        tl.load(frame_ids + request), packed, in_frame, head, first,
        PAGE, SINKS, SINK_ROWS, SOFT_CAP, True,
    )  # fmt: skip

    last_new = tl.minimum((first_row + ROWS - 1) // GROUP + 1, count)
    for first_new in tl.range(tl.maximum(least_first - old, 0), last_new, TILES * 16):
        token = first_new + tl.arange(0, TILES * 16)
        visible = token < last_new
        keys, values = load_raw_rows(
            new_key, new_value, (begin + token).to(tl.int64) * PAGE.heads + head, PAGE.head_dim, visible, PAGE.head_dim
        )
        mask = visible[None, :] & (token[None, :] <= new[:, None])
        if WINDOW_LEFT >= 0:
            mask = mask & (old + token[None, :] >= first[:, None])
        out_sum, top, total = attend_many(out_sum, top, total, vectors, unit, keys, values, mask, SOFT_CAP)

    out_sum, log2_sum = finish(out_sum, top, total)
    offset = query_row[:, None] * PAGE.head_dim + natural[None, :]
    tl.store(out + offset, (out_sum * (1 / HALF_GAIN)).to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + query_row, log2_sum * LN_2, mask=exists)
