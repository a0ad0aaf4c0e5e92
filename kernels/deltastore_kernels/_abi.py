"""The structs of csrc/include/deltastore/abi.h, as ctypes sees them."""

from __future__ import annotations

from ctypes import Structure, c_double, c_int64, c_void_p
from functools import cache
from typing import ClassVar

import torch

from .context import LayerStore, Scoring
from .layout import PageLayout

#: as abi.h numbers them
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Layout(Structure):
    """abi.h: deltastore::PageLayout."""

    _fields_: ClassVar = [(name, c_int64) for name in ("key_bits", "value_bits", "kv_heads", "head_dim", "page_tokens")]

    @classmethod
    @cache
    def of(cls, layout: PageLayout) -> Layout:
        fmt = layout.format
        return cls(fmt.key_bits, fmt.value_bits, layout.num_kv_heads, layout.head_dim, layout.page_tokens)


class Pages(Structure):
    """layout.h: deltastore::PagesOf. Keeps no reference to the tensors."""

    _fields_: ClassVar = [
        ("layout", Layout),
        ("coarse_layout", Layout),
        ("first", c_void_p),
        ("end", c_void_p),
        ("count", c_int64),
        ("coarse_count", c_int64),
    ]

    @classmethod
    def of(cls, store: LayerStore) -> Pages:
        layout, pages, coarse = Layout.of(store.layout), store.pages, store.coarse
        if coarse is None:
            return cls(layout, layout, pages.data_ptr(), None, len(pages), 0)
        end = coarse.pages.data_ptr() + coarse.pages.nbytes
        return cls(layout, Layout.of(coarse.layout), pages.data_ptr(), end, len(pages), len(coarse.pages))


class Context(Structure):
    """abi.h: DeltastoreContext. Keeps no reference to the tensors: the caller does, during the call."""

    _fields_: ClassVar = [
        ("pages", Pages),
        ("batch", c_int64),
        ("page_table", c_void_p),
        ("table_stride", c_int64),
        ("packed_tokens", c_void_p),
        ("frame_key_rot", c_void_p),
        ("frame_value_rot", c_void_p),
        ("num_frames", c_int64),
        ("frame_ids", c_void_p),
        ("frame_tokens", c_void_p),
        ("sink_key_rot", c_void_p),
        ("sink_value_rot", c_void_p),
        ("num_sinks", c_int64),
        ("sink_tokens", c_int64),
        ("sink_ids", c_void_p),
        ("is_checked", c_int64),
    ]


class ScoringC(Structure):
    """abi.h: DeltastoreScoring."""

    _fields_: ClassVar = [("scale", c_double), ("soft_cap", c_double), ("window_left", c_int64)]

    @classmethod
    @cache
    def of(cls, scoring: Scoring) -> ScoringC:
        return cls(scoring.scale, scoring.soft_cap, -1 if scoring.window_left is None else scoring.window_left)


class TileRows(Structure):
    """abi.h: DeltastoreTileRows."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("tile_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    ]

    @classmethod
    def of(cls, tiles: torch.Tensor) -> TileRows:
        return cls(tiles.data_ptr(), *tiles.stride()[:3])


class Floats(Structure):
    """abi.h: DeltastoreFloats."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("type", c_int64),
        ("outer", c_int64),
        ("inner", c_int64),
        ("head_dim", c_int64),
        ("outer_stride", c_int64),
        ("inner_stride", c_int64),
    ]

    @classmethod
    def of(cls, rows: torch.Tensor) -> Floats:
        """rows [outer, inner, D] of a type in FLOAT_TYPES, D contiguous."""
        outer, inner, head_dim = rows.shape
        outer_stride, inner_stride, _ = rows.stride()
        return cls(rows.data_ptr(), FLOAT_TYPES[rows.dtype], outer, inner, head_dim, outer_stride, inner_stride)


class LayerStoreC(Structure):
    """abi.h: DeltastoreLayerStore."""

    _fields_: ClassVar = [
        ("pages", Pages),
        ("frame_key_rot", c_void_p),
        ("frame_value_rot", c_void_p),
        ("num_frames", c_int64),
        ("sink_key_rot", c_void_p),
        ("sink_value_rot", c_void_p),
        ("num_sinks", c_int64),
        ("sink_tokens", c_int64),
        ("key_shaping", c_void_p),
    ]


class TokenWritesC(Structure):
    """abi.h: DeltastoreTokenWrites."""

    _fields_: ClassVar = [
        ("tiles", c_int64),
        *((name, c_void_p) for name in ("tile_sources", "tile_frames", "page_ids", "tile_ids")),
        ("rests", c_int64),
        *((name, c_void_p) for name in ("rest_rows", "rest_frames", "rest_lanes")),
        ("sinks", c_int64),
        *((name, c_void_p) for name in ("sink_rows", "sink_ids")),
    ]
