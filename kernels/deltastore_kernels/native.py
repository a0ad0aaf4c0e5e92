"""The compiled CPU kernels: finding, checking and calling `_cpu.so` (kernels/csrc, built by setup.py).

The library is plain C (csrc/include/deltastore/abi.h) and is loaded on first use. Environment, for
tests and bug reports: DELTASTORE_CPU=amx|avx512_vnni|avx2|portable forces an instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_double, c_int8, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import _checks
from ._abi import FLOAT_TYPES, Context, Floats, LayerStoreC, Layout, Pages, ScoringC, TileRows, TokenWritesC
from .context import LayerStore
from .layout import PageLayout
from .token_writes import TokenWrites

LIBRARY = Path(__file__).with_name("_cpu.so")
ABI_VERSION = 11
BUILD = "build it with `pip install --no-build-isolation --no-deps -e .` where a C++ compiler is at hand"


class LibraryUnavailable(RuntimeError):
    """The compiled kernels cannot be used here; the message says why and what to do."""


@cache
def library() -> CDLL:
    """The library, ready for calls. Raises LibraryUnavailable with the reason."""
    if not LIBRARY.exists():
        raise LibraryUnavailable(f"the compiled CPU kernels are missing ({LIBRARY.name}): {BUILD}")
    try:
        lib = CDLL(str(LIBRARY))
    except OSError as error:
        raise LibraryUnavailable(f"the compiled CPU kernels do not load: {error}; {BUILD}") from error
    if (found := lib.deltastore_abi_version()) != ABI_VERSION:
        raise LibraryUnavailable(f"the compiled CPU kernels are of version {found}, not {ABI_VERSION}: {BUILD}")
    for name in (
        "isa",
        "isas",
        "use_isa",
        "last_error",
        "check_context",
        "attend_decode",
        "attend_extend",
        "decode",
        "encode",
        "store_tokens",
        "rotate",
    ):
        getattr(lib, f"deltastore_{name}").restype = c_char_p
    lib.deltastore_use_isa.argtypes = [c_char_p]
    lib.deltastore_page_layout.argtypes = [POINTER(Layout), POINTER(c_int64)]
    lib.deltastore_page_layout.restype = None
    lib.deltastore_codec.restype = None
    lib.deltastore_check_context.argtypes = [POINTER(Context)]
    lib.deltastore_attend_decode.argtypes = [
        POINTER(Context), POINTER(ScoringC), c_void_p, c_int64, c_void_p, c_void_p, c_int64,
    ]  # fmt: skip
    lib.deltastore_attend_extend.argtypes = [
        POINTER(Context), POINTER(ScoringC), c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
        c_int64,
    ]  # fmt: skip
    lib.deltastore_decode.argtypes = [
        POINTER(Layout), c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64,
    ]  # fmt: skip
    lib.deltastore_encode.argtypes = [
        POINTER(Layout), c_void_p, c_int64, c_void_p, c_void_p, c_int64, POINTER(TileRows), POINTER(TileRows), c_int64,
        c_void_p, c_int64,
    ]  # fmt: skip
    lib.deltastore_store_tokens.argtypes = [
        POINTER(LayerStoreC), POINTER(TokenWritesC), POINTER(Floats), POINTER(Floats), c_int64,
    ]  # fmt: skip
    lib.deltastore_rotate.argtypes = [c_void_p, *[c_int64] * 6, c_void_p, c_int64]
    lib.deltastore_read_bytes.restype = ctypes.c_uint64
    lib.deltastore_read_bytes.argtypes = [c_void_p, c_int64, c_int64]
    if lib.deltastore_isa() is None:
        raise LibraryUnavailable(lib.deltastore_last_error().decode())
    return lib


def available() -> bool:
    """Whether the compiled kernels can be used. A wrong DELTASTORE_CPU raises all the same."""
    return LIBRARY.exists() and library() is not None


def isa() -> str:
    """Name of the instruction set in use."""
    return library().deltastore_isa().decode()


def isas() -> list[str]:
    """The instruction sets that this CPU and this build have, best first."""
    return library().deltastore_isas().decode().split()


def use_isa(name: str) -> None:
    """Switch the whole process to another instruction set."""
    check(library().deltastore_use_isa(name.encode()))


def check(refusal: bytes | None) -> None:
    if refusal is not None:
        raise ValueError(refusal.decode())


def int64_tensor(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is one already: asking torch to convert it costs microseconds in every layer."""
    return x if x.dtype is torch.int64 and x.is_contiguous() else x.to(torch.int64).contiguous()


def decode(
    pages: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout, key_rot: torch.Tensor, value_rot: torch.Tensor
) -> None:
    """Write the pages' first tokens, in order, to key_rot and value_rot [H, tokens, D] float32: as many
    as fit (whole tiles). Both may be slices of longer buffers."""
    _checks.require_pages(pages, layout)
    _checks.require_decoded(key_rot, value_rot, page_ids, layout)
    page_ids = int64_tensor(page_ids)
    refusal = library().deltastore_decode(
        byref(Layout.of(layout)),
        pages.data_ptr(),
        len(pages),
        page_ids.data_ptr(),
        key_rot.shape[1],
        key_rot.data_ptr(),
        value_rot.data_ptr(),
        key_rot.stride(0),
        torch.get_num_threads(),
    )
    check(refusal)


def encode(
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    page_ids: torch.Tensor,
    tile_ids: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    key_shaping: torch.Tensor | None = None,
) -> None:
    """key_rot, value_rot [N, H, 16, D] float16 or float32, D contiguous; key_shaping [H, D, D]; pages written."""
    _checks.require_pages(pages, layout)
    _checks.require_tiles(key_rot, value_rot, page_ids, tile_ids, layout)
    if key_shaping is not None:
        _checks.require_shaping(key_shaping, layout)
    ids = (int64_tensor(page_ids), int64_tensor(tile_ids))
    refusal = library().deltastore_encode(
        byref(Layout.of(layout)),
        pages.data_ptr(),
        len(pages),
        ids[0].data_ptr(),
        ids[1].data_ptr(),
        len(page_ids),
        byref(TileRows.of(key_rot)),
        byref(TileRows.of(value_rot)),
        key_rot.dtype == torch.float16,
        None if key_shaping is None else key_shaping.data_ptr(),
        torch.get_num_threads(),
    )
    check(refusal)


def store_tokens(key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites, store: LayerStore) -> None:
    """key_rot, value_rot [T, H, D] of types in FLOAT_TYPES, D contiguous; the store's tensors are written."""
    shape = (key_rot.shape[0], store.layout.num_kv_heads, store.layout.head_dim)
    _checks.require_rows("store_tokens: key_rot", key_rot, shape)
    _checks.require_rows("store_tokens: value_rot", value_rot, shape)
    refusal = library().deltastore_store_tokens(
        byref(store_view(store)),
        byref(_kept_view(writes, _writes_view)),
        byref(Floats.of(key_rot)),
        byref(Floats.of(value_rot)),
        torch.get_num_threads(),
    )
    check(refusal)


def _kept_view(owner: object, make: Callable[[Any], Structure]) -> Structure:
    """The C view of a frozen dataclass, made once: it is the same for all layers, or for all steps."""
    kept = vars(owner)
    if "_view" not in kept:
        kept["_view"] = make(owner)
    return kept["_view"]


def store_view(store: LayerStore) -> LayerStoreC:
    """The C view of one layer's tensors, checked and made once."""
    return _kept_view(store, _store_view)


def _store_view(store: LayerStore) -> LayerStoreC:
    _checks.require_store(store)
    frames, sinks = (store.frame_key_rot, store.frame_value_rot), (store.sink_key_rot, store.sink_value_rot)
    return LayerStoreC(
        Pages.of(store),
        *(side.data_ptr() for side in frames),
        len(frames[0]),
        *(side.data_ptr() for side in sinks),
        len(sinks[0]),
        sinks[0].shape[2],
        None if store.key_shaping is None else store.key_shaping.data_ptr(),
    )


def _writes_view(writes: TokenWrites) -> TokenWritesC:
    _checks.require_writes(writes)
    view = TokenWritesC(tiles=len(writes.page_ids), rests=len(writes.rest_rows), sinks=len(writes.sink_rows))
    for name, kind in TokenWritesC._fields_:
        if kind is c_void_p:
            setattr(view, name, getattr(writes, name).data_ptr())
    return view


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x [outer, inner, D] of a type in FLOAT_TYPES, D contiguous and in layout.HEAD_DIMS -> the same, contiguous."""
    outer, inner, head_dim = x.shape
    _checks.require_rows("rotate", x, (outer, inner, head_dim))
    outer_stride, inner_stride, _ = x.stride()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    refusal = library().deltastore_rotate(
        x.data_ptr(),
        FLOAT_TYPES[x.dtype],
        outer,
        inner,
        head_dim,
        outer_stride,
        inner_stride,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(refusal)
    return out


def read_bytes(data: torch.Tensor) -> int:
    """For benchmarks: merely read a tensor's memory. Returns the parity of its 8-byte words."""
    return library().deltastore_read_bytes(data.data_ptr(), data.nbytes, torch.get_num_threads())


def page_layout_sizes(layout: PageLayout) -> list[int]:
    """What the library computes for a layout; the order is that of abi.h."""
    sizes = (c_int64 * 10)()
    library().deltastore_page_layout(byref(Layout.of(layout)), sizes)
    return list(sizes)


def codec_numbers(bits: int) -> tuple[list[int], float, list[float], list[float]]:
    """What the library was compiled with: levels, their unit, anchor scales, nibble factors."""
    levels, unit = (c_int8 * (1 << bits))(), c_double()
    anchors, factors = (ctypes.c_float * 256)(), (ctypes.c_float * 16)()
    library().deltastore_codec(c_int64(bits), levels, byref(unit), anchors, factors)
    return list(levels), unit.value, list(anchors), list(factors)
