"""Whether tensors are what the compiled kernels take them for, before their addresses are given away.

A tensor of another type, shape or order would be read and written out of bounds, so these are errors and no assertions,
which `python -O` leaves out. What differs from layer to layer is looked at in every call, for half a microsecond a
tensor (hence `shape[0]`: `len` of a tensor takes a whole one); what a step's layers share is looked at once,
when the step is planned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch

from ._abi import FLOAT_TYPES
from .context import CoarsePages, LayerStore, StepContext
from .layout import TILE_TOKENS, PageLayout
from .packing import RAW_DTYPE
from .token_writes import TokenWrites

INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def refuse(what: str, x: torch.Tensor, allowed: str) -> NoReturn:
    """Raises ValueError: what was given, and what is allowed."""
    given = f"shape {tuple(x.shape)}, strides {x.stride()}, {x.dtype} on {x.device}"
    raise ValueError(f"{what}: given are {given}; must be {allowed}")


def require(what: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """x must be of this dtype and shape, contiguous and in the CPU's memory."""
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        refuse(what, x, f"shape {shape}, contiguous, {dtype} on the CPU")


def require_pages(pages: torch.Tensor, layout: PageLayout) -> None:
    require("pages", pages, torch.uint8, (pages.shape[0], layout.page_bytes))


def _require_coarse(coarse: CoarsePages, layout: PageLayout) -> None:
    if layout.format.is_raw or replace(coarse.layout, format=layout.format) != layout:
        raise ValueError(f"coarse pages of {coarse.layout} beside {layout}; must be the same but for fewer packed bits")
    require_pages(coarse.pages, coarse.layout)


def _require_frames(key_rot: torch.Tensor, value_rot: torch.Tensor, layout: PageLayout) -> None:
    """frames [any, H, 16, D]"""
    shape = (key_rot.shape[0], layout.num_kv_heads, TILE_TOKENS, layout.head_dim)
    require("frame_key_rot", key_rot, RAW_DTYPE, shape)
    require("frame_value_rot", value_rot, RAW_DTYPE, shape)


def _require_sinks(key_rot: torch.Tensor, value_rot: torch.Tensor, layout: PageLayout) -> None:
    """sinks [slots, H, at most 16, D]"""
    tokens = key_rot.shape[2] if key_rot.dim() == 4 else TILE_TOKENS
    shape = (key_rot.shape[0], layout.num_kv_heads, min(tokens, TILE_TOKENS), layout.head_dim)
    require("sink_key_rot", key_rot, RAW_DTYPE, shape)
    require("sink_value_rot", value_rot, RAW_DTYPE, shape)


def require_step(step: StepContext) -> None:
    """Each request has a row of the page table and one entry in each of the vectors."""
    requests, table = len(step.packed_tokens), step.page_table
    if table.dim() != 2 or len(table) != requests or table.dtype not in INT_DTYPES or not table.is_cpu:
        refuse("page_table", table, f"a matrix of {requests} rows of integers on the CPU: one for each request")
    for name in ("packed_tokens", "frame_ids", "frame_tokens", "sink_ids"):
        ids = getattr(step, name)
        if ids.dim() != 1 or len(ids) != requests or ids.dtype not in INT_DTYPES or not ids.is_cpu:
            refuse(name, ids, f"a vector of {requests} integers on the CPU: one for each request")


def require_queries(query_rot: torch.Tensor, layout: PageLayout) -> None:
    """query_rot [rows, Hq, D], of any float type."""
    if query_rot.dim() != 3 or query_rot.shape[2] != layout.head_dim or not query_rot.is_cpu:
        refuse("query_rot", query_rot, f"(rows, query heads, {layout.head_dim}) on the CPU")


def require_new_tokens(
    total: int, query_rot: torch.Tensor, key_rot: torch.Tensor, value_rot: torch.Tensor, layout: PageLayout
) -> None:
    """One row of each for each of a step's `total` new tokens."""
    require_queries(query_rot, layout)
    if query_rot.shape[0] != total:
        refuse("query_rot", query_rot, f"one row for each of the step's {total} new tokens")
    shape = (total, layout.num_kv_heads, layout.head_dim)
    for name, rows in (("key_rot", key_rot), ("value_rot", value_rot)):
        if rows.shape != shape or not rows.is_cpu:
            refuse(name, rows, f"shape {shape} on the CPU")


def require_decoded(key_rot: torch.Tensor, value_rot: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout) -> None:
    """key_rot, value_rot [H, tokens, D]: whole tiles, each head's rows in one piece, as many as the pages hold."""
    most = len(page_ids) * layout.page_tokens
    allowed = (
        f"float32 of shape ({layout.num_kv_heads}, tokens, {layout.head_dim}) on the CPU, each head in one piece, "
        f"keys and values of the same strides; tokens a multiple of {TILE_TOKENS}, at most {most}: what "
        f"{len(page_ids)} pages hold"
    )
    for what, rows in (("key_rot", key_rot), ("value_rot", value_rot)):
        if rows.dim() != 3 or rows.dtype is not torch.float32 or not rows.is_cpu:
            refuse(f"decode: {what}", rows, allowed)
        heads, tokens, head_dim = rows.shape
        if (heads, head_dim) != (layout.num_kv_heads, layout.head_dim) or tokens % TILE_TOKENS or tokens > most:
            refuse(f"decode: {what}", rows, allowed)
        if rows.shape != key_rot.shape or rows.stride() != key_rot.stride() or rows.stride()[1:] != (head_dim, 1):
            refuse(f"decode: {what}", rows, allowed)


def require_tiles(
    key_rot: torch.Tensor, value_rot: torch.Tensor, page_ids: torch.Tensor, tile_ids: torch.Tensor, layout: PageLayout
) -> None:
    """key_rot, value_rot [N, H, 16, D], D contiguous, float16 or float32 both."""
    shape = (len(page_ids), layout.num_kv_heads, TILE_TOKENS, layout.head_dim)
    for what, tiles in (("key_rot", key_rot), ("value_rot", value_rot)):
        if (
            tiles.shape != shape
            or tiles.dtype not in (torch.float16, torch.float32)
            or tiles.dtype is not key_rot.dtype
            or tiles.stride(-1) != 1
            or not tiles.is_cpu
        ):
            allowed = f"shape {shape}, the last dim in one piece, float16 or float32, keys and values alike, on the CPU"
            refuse(f"encode: {what}", tiles, allowed)
    if tile_ids.shape != page_ids.shape:
        refuse("encode: tile_ids", tile_ids, f"one for each of {len(page_ids)} page_ids")


def require_store(store: LayerStore) -> None:
    layout = store.layout
    require_pages(store.pages, layout)
    if store.coarse is not None:
        _require_coarse(store.coarse, layout)
    _require_frames(store.frame_key_rot, store.frame_value_rot, layout)
    _require_sinks(store.sink_key_rot, store.sink_value_rot, layout)
    if store.key_shaping is not None:
        require_shaping(store.key_shaping, layout)


def require_writes(writes: TokenWrites) -> None:
    tiles, rests, sinks = len(writes.page_ids), len(writes.rest_rows), len(writes.sink_rows)
    require("tile_sources", writes.tile_sources, torch.int64, (tiles, TILE_TOKENS))
    for length, names in (
        (tiles, ("tile_frames", "page_ids", "tile_ids")),
        (rests, ("rest_rows", "rest_frames", "rest_lanes")),
        (sinks, ("sink_rows", "sink_ids")),
    ):
        for name in names:
            require(name, getattr(writes, name), torch.int64, (length,))


def require_rows(what: str, rows: torch.Tensor, shape: tuple[int, ...]) -> None:
    """rows of this shape, of a type in FLOAT_TYPES, the last dim in one piece."""
    if rows.shape != shape or rows.dtype not in FLOAT_TYPES or rows.stride(-1) != 1 or not rows.is_cpu:
        refuse(what, rows, f"shape {shape}, the last dim in one piece, of {[*FLOAT_TYPES]} on the CPU")


def require_shaping(key_shaping: torch.Tensor, layout: PageLayout) -> None:
    shape = (layout.num_kv_heads, layout.head_dim, layout.head_dim)
    try:
        require("key_shaping", key_shaping, torch.float32, shape)
    except ValueError as error:
        raise ValueError(f"{error}: calibrate this model again") from None
