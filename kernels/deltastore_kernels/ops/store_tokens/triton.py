"""store_tokens in Triton: whole tiles into pages, the rest into frames and sinks, in one launch of a decode step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...context import LayerStore
from ...layout import TILE_TOKENS
from ...token_writes import TokenWrites
from .._triton import PageConstants, use_asm
from ..encode.triton import encode_rows, finite, halves, launch, own_tokens, shaped_at_once, tables


def store_tokens(key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites, store: LayerStore) -> None:
    """As the twin; nothing waits, and no shape depends on a value."""
    use_asm(store.pages)
    key, value = (side if side.stride(-1) == 1 else side.contiguous() for side in (key_rot, value_rot))
    layout, shaped = store.layout, store.key_shaping is not None
    tiles, rest = len(writes.page_ids), len(writes.rest_rows)
    rows = rest + (len(writes.sink_rows) if store.sink_tokens else 0)
    # A request in sixteen completes a tile where each brings one token.
    whole = tiles if writes.refills_frames else -(-tiles // TILE_TOKENS)
    own = shaped_at_once(whole * layout.num_kv_heads) if shaped else TILE_TOKENS
    # Programs of one launch run in any order: what tiles are taken from is overwritten by another.
    launches = ((0, tiles), (tiles, rows)) if writes.takes_frames and writes.refills_frames else ((0, tiles + rows),)
    for first, programs in launches:
        if programs:
            store_rows[(programs, layout.num_kv_heads, TILE_TOKENS // own)](
                first,
                tiles,
                rest,
                key,
                value,
                *key.stride()[:2],
                *value.stride()[:2],
                writes.tile_sources,
                writes.tile_frames,
                writes.page_ids,
                writes.tile_ids,
                writes.rest_rows,
                writes.rest_frames,
                writes.rest_lanes,
                writes.sink_rows,
                writes.sink_ids,
                store.pages,
                store.frame_key_rot,
                store.frame_value_rot,
                store.sink_key_rot,
                store.sink_value_rot,
                *tables(layout.format, store.key_shaping, key.device),
                PAGE=PageConstants.of(layout),
                SINKS=store.sink_tokens,
                **halves(layout.format),
                SHAPED=shaped,
                OWN=own,
                **launch(layout.head_dim),
            )


@triton.jit
def store_rows(
    first,  # program, of this launch
    tiles,
    rest,
    key_rot,  # [T, H, D], the last dim without gaps
    value_rot,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    tile_sources,  # indices, as TokenWrites has them
    tile_frames,
    page_ids,
    tile_ids,
    rest_rows,
    rest_frames,
    rest_lanes,
    sink_rows,
    sink_ids,
    pages,
    frame_key,  # [frames, H, 16, D] float16
    frame_value,
    sink_key,  # [sinks, H, SINKS, D] float16
    sink_value,
    key_shaping,  # as `encode_tile` reads them
    key_codes,
    key_levels,
    value_codes,
    value_levels,
    PAGE: tl.constexpr,
    SINKS: tl.constexpr,
    KEY_HALVES: tl.constexpr,
    VALUE_HALVES: tl.constexpr,
    SHAPED: tl.constexpr,
    OWN: tl.constexpr,
):
    """One head of a tile, of a token that goes to a frame, or of a sequence's first tokens: programs in this order."""
    program, head = first + tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_head, value_head = key_rot + head * key_head_stride, value_rot + head * value_head_stride
    if program < tiles:
        token, own = tl.arange(0, 16), own_tokens(OWN)
        sources = tile_sources + program.to(tl.int64) * 16
        source, own_source = tl.load(sources + token).to(tl.int64), tl.load(sources + own).to(tl.int64)
        new, own_new = tl.maximum(source, 0), tl.maximum(own_source, 0)
        lanes = (tl.load(tile_frames + program).to(tl.int64) * PAGE.heads + head) * (16 * PAGE.head_dim)
        waiting = lanes + token * PAGE.head_dim
        encode_rows(
            key_head + new * key_token_stride, value_head + new * value_token_stride,
            frame_key + waiting, frame_value + waiting, source < 0,
            key_head + own_new * key_token_stride, frame_key + lanes + own * PAGE.head_dim, own_source < 0,
            tl.load(page_ids + program).to(tl.int64), tl.load(tile_ids + program).to(tl.int64), pages, head,
            key_shaping, key_codes, key_levels, value_codes, value_levels,
            PAGE, KEY_HALVES, VALUE_HALVES, SHAPED, OWN, True,
        )  # fmt: skip
    elif tl.program_id(2) > 0:
        return
    elif program < tiles + rest:
        one = program - tiles
        lane = (tl.load(rest_frames + one).to(tl.int64) * PAGE.heads + head) * 16 + tl.load(rest_lanes + one)
        row = tl.load(rest_rows + one).to(tl.int64)
        _keep(frame_key + lane * PAGE.head_dim, key_head + row * key_token_stride, PAGE.head_dim)
        _keep(frame_value + lane * PAGE.head_dim, value_head + row * value_token_stride, PAGE.head_dim)
    else:
        one = program - tiles - rest
        place = (tl.load(sink_ids + one).to(tl.int64) * PAGE.heads + head) * SINKS
        row = tl.load(sink_rows + one).to(tl.int64)
        for token in tl.static_range(SINKS):
            kept = (place + token) * PAGE.head_dim
            _keep(sink_key + kept, key_head + (row + token) * key_token_stride, PAGE.head_dim)
            _keep(sink_value + kept, value_head + (row + token) * value_token_stride, PAGE.head_dim)


@triton.jit
def _keep(target, x, HEAD_DIM: tl.constexpr):
    """A row [D] as packing.to_raw has it."""
    dims = tl.arange(0, HEAD_DIM)
    tl.store(target + dims, finite(tl.load(x + dims).to(tl.float16)).to(tl.float16))
