"""The Triton kernels compiled ahead of time, for GPUs that are not here.

`everything()` and `a_few()` list what serving launches, each with all that a launch would specialize; `compile_for`
gives the compiled kernel with its `asm` ("ptx", "cubin" or "amdgcn") and `metadata` (shared memory, warps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..layout import GPU_HEAD_DIMS, PACKED_BITS, RAW, Format, PageLayout
from . import _triton_leave
from ._triton import PageConstants
from .attend_decode import triton as attend_decode
from .attend_extend import triton as attend_extend
from .decode import triton as decode
from .encode import triton as encode
from .enter import triton as enter
from .rotate import triton as rotate
from .store_tokens import triton as store_tokens

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FORMATS = (*(Format(*bits) for bits in product(PACKED_BITS, repeat=2)), RAW)
PAGE_TOKENS, HEADS = 64, 8


@dataclass(frozen=True)
class Instantiation:
    """A kernel with all that a launch fixes. `types` are Triton's: "*u8", "i32", "fp32"; `launch` gives constants and
    options for a `generation` of device; tokens_per_loop of the main loop and one KV head, 0 where there is none."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, object]
    launch: Callable[[int], dict[str, int]] = lambda _: {}
    tokens_per_loop: int = 0

    def __str__(self) -> str:
        return self.name


def compile_for(instantiation: Instantiation, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compile without a GPU. Pointers and strides are taken as multiples of 16, as Torch's allocator gives them."""
    names = instantiation.kernel.arg_names
    nvidia = target.backend == "cuda"
    launch = instantiation.launch(target.arch // 10 if nvidia else 0)
    constants = instantiation.constants | {name: value for name, value in launch.items() if name in names}
    if "USE_ASM" in names:
        constants["USE_ASM"] = nvidia
    signature = {name: "constexpr" if name in constants else instantiation.types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        instantiation.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: value for name, value in launch.items() if name not in names}
    return triton.compile(source, target=target, options=options)


def everything() -> list[Instantiation]:
    """All formats, head dims and group sizes; minutes for each target."""
    attention = [
        make(fmt, head_dim, group)
        for make in (attend_own, attend_shared, attend_rows)
        for fmt, head_dim, group in product(FORMATS, GPU_HEAD_DIMS, (1, 4, 8))
    ]
    pages = [decode_tiles(fmt, head_dim) for fmt, head_dim in product(FORMATS, GPU_HEAD_DIMS)]
    pages += [
        make(*point) for make in (encode_tile, store_rows) for point in product(FORMATS, GPU_HEAD_DIMS, (False, True))
    ]
    rows = [make(*point) for make in (leave_row, enter_rows) for point in product(GPU_HEAD_DIMS, (False, True))]
    return attention + pages + rows + [rotate_rows(head_dim) for head_dim in GPU_HEAD_DIMS]


def a_few() -> list[Instantiation]:
    """Every kernel, and every way to unpack."""
    return [
        attend_own(Format(4, 2), 128, 4),
        attend_own(Format(3, 2), 128, 4),
        attend_own(RAW, 64, 8),
        attend_shared(Format(3, 3), 64, 4, WINDOW_LEFT=4096, SOFT_CAP=50.0),
        attend_rows(Format(4, 2), 128, 4, WINDOW_LEFT=4096),
        encode_tile(Format(4, 3), 128, False),
        encode_tile(Format(3, 2), 64, True),
        *(store_rows(Format(4, 3), 128, True, OWN=own) for own in (4, 16)),
        store_rows(RAW, 64, False),
        decode_tiles(Format(3, 4), 128),
        *(make(128, more) for make in (leave_row, enter_rows) for more in (False, True)),
        rotate_rows(128),
    ]


_CONTEXT_TYPES = {
    "query": "*bf16",
    "pages": "*u8",
    "page_table": "*i32",
    "table_stride": "i32",
    "packed_tokens": "*i32",
    "frame_tokens": "*i32",
    "sink_ids": "*i64",
    "scale": "fp32",
    "frame_key": "*fp16",
    "frame_value": "*fp16",
    "frame_ids": "*i64",
    "sink_key": "*fp16",
    "sink_value": "*fp16",
}
_DECODE_TYPES = _CONTEXT_TYPES | {
    "partial_out": "*fp32",
    "partial_log2": "*fp32",
    "leader": "*i32",
    "shared_pages": "*i32",
    "batch": "i32",
}


def attend_own(fmt: Format, head_dim: int, group: int, **changed: object) -> Instantiation:
    """One request's own tiles."""
    return Instantiation(
        f"attend_own {fmt} D={head_dim} GQA={group}",
        attend_decode.attend_own,
        _DECODE_TYPES,
        _attention_constants(fmt, head_dim, group) | _PARTS | {"HAS_SHARED": False, "SINK_ROWS": 16} | changed,
        partial(attend_decode.own_launch, group, head_dim),
        tokens_per_loop=16 * attend_decode.block_tiles(head_dim),
    )


def attend_shared(fmt: Format, head_dim: int, group: int, **changed: object) -> Instantiation:
    """A shared prefix for many requests."""
    return Instantiation(
        f"attend_shared {fmt} D={head_dim} GQA={group}",
        attend_decode.attend_shared,
        _DECODE_TYPES,
        _attention_constants(fmt, head_dim, group) | _PARTS | {"BATCH": 64, "FIRST_PART": 16} | changed,
        partial(attend_decode.shared_launch, group, head_dim),
        tokens_per_loop=16 * attend_decode.block_tiles(head_dim),
    )


def attend_rows(fmt: Format, head_dim: int, group: int, **changed: object) -> Instantiation:
    """New tokens."""
    return Instantiation(
        f"attend_rows {fmt} D={head_dim} GQA={group}",
        attend_extend.attend_rows,
        _CONTEXT_TYPES | {"blocks": "*i32", "new_key": "*bf16", "new_value": "*bf16", "out": "*bf16", "lse": "*fp32"},
        _attention_constants(fmt, head_dim, group) | {"SINK_ROWS": 16} | changed,
        lambda _: attend_extend.launch(head_dim),
        tokens_per_loop=16 * attend_decode.block_tiles(head_dim),
    )


_PARTS = {"PARTS": 16, "ALL_PARTS": 32}


def _attention_constants(fmt: Format, head_dim: int, group: int) -> dict[str, object]:
    return {
        "PAGE": PageConstants.of(PageLayout(fmt, HEADS, head_dim, PAGE_TOKENS)),
        "GROUP": group,
        "SINKS": 4,
        "SOFT_CAP": 0.0,
        "WINDOW_LEFT": -1,
    }


def leave_row(head_dim: int, sinks: bool) -> Instantiation:
    """The parts of a decode, and the way out; with learned sinks and a calibration."""
    return Instantiation(
        f"leave_row D={head_dim}{' sinks' * sinks}",
        _triton_leave.leave_row,
        {"partial_out": "*fp32", "partial_log2": "*fp32", "parts": "i32", "query_rot": "*bf16", "sink_logits": "*bf16"}
        | {"rotated_mean": "*fp32", "out": "*bf16", "lse": "*fp32", "score_scale": "fp32", "scale": "fp32"},
        {"QUERY_HEADS": 4 * HEADS, "GROUP": 4, "HEAD_DIM": head_dim, "OUT_DIM": head_dim, "RESTORED": True}
        | {"HAS_SINKS": sinks, "HAS_MEAN": sinks},
        lambda _: _triton_leave.launch(head_dim),
    )


def enter_rows(head_dim: int, calibrated: bool) -> Instantiation:
    """enter; heads of the model a little narrower than stored where they are calibrated."""
    sides = ("query", "key", "value")
    dim = head_dim * 3 // 4 if calibrated else head_dim
    return Instantiation(
        f"enter_rows D={head_dim}{' calibrated' * calibrated}",
        enter.enter_rows,
        {side: "*bf16" for side in (*sides, *(f"{side}_rot" for side in sides))}
        | {f"{side}_{stride}_stride": "i32" for side in sides for stride in ("token", "head")}
        | {"query_rotation": "*fp32", "key_rotation": "*fp32", "rotated_mean": "*fp32", "tokens": "i32"}
        | {"scale": "fp32"},
        {"HEADS": HEADS, "GROUP": 4, "HEAD_DIM": head_dim, "KEY_DIM": dim, "VALUE_DIM": dim},
        lambda generation: enter.launch(head_dim, calibrated, generation > 0),
    )


def rotate_rows(head_dim: int) -> Instantiation:
    """rotate."""
    return Instantiation(
        f"rotate_rows D={head_dim}",
        rotate.rotate_rows,
        {"x": "*bf16", "out": "*bf16", "count": "i32", "scale": "fp32"},
        {"HEAD_DIM": head_dim, "ROWS": rotate.BLOCK_ELEMENTS // head_dim, "ROUNDS": head_dim.bit_length() - 1},
    )


def decode_tiles(fmt: Format, head_dim: int) -> Instantiation:
    """decode."""
    return Instantiation(
        f"decode_tiles {fmt} D={head_dim}",
        decode.decode_tiles,
        {"pages": "*u8", "page_ids": "*i64", "key_rot": "*fp32", "value_rot": "*fp32"},
        {"PAGE": PageConstants.of(PageLayout(fmt, HEADS, head_dim, PAGE_TOKENS)), **decode.units(fmt)}
        | {"TILES": decode.BLOCK_TILES},
    )


_TABLES = {"key_shaping": "*fp32"} | {
    f"{side}_{table}": types for side in ("key", "value") for table, types in (("codes", "*u8"), ("levels", "*fp32"))
}


def _encoding(fmt: Format, head_dim: int, shaped: bool) -> dict[str, object]:
    layout = PageLayout(fmt, HEADS, head_dim, PAGE_TOKENS)
    own = encode.shaped_at_once(1) if shaped else 16
    return {"PAGE": PageConstants.of(layout), **encode.halves(fmt), "SHAPED": shaped, "OWN": own}


def encode_tile(fmt: Format, head_dim: int, shaped: bool) -> Instantiation:
    """encode."""
    strides = ("stride_n", "stride_head", "stride_token")
    return Instantiation(
        f"encode_tile {fmt} D={head_dim}{' shaped' * shaped}",
        encode.encode_tile,
        {"key_rot": "*bf16", "value_rot": "*bf16", "page_ids": "*i64", "tile_ids": "*i64", "pages": "*u8"}
        | {f"{side}_{stride}": "i32" for side in ("key", "value") for stride in strides}
        | _TABLES,
        _encoding(fmt, head_dim, shaped),
        lambda _: encode.launch(head_dim),
    )


def store_rows(fmt: Format, head_dim: int, shaped: bool, **changed: object) -> Instantiation:
    """store_tokens."""
    indices = ("tile_sources", "tile_frames", "page_ids", "tile_ids", "rest_rows", "rest_frames", "rest_lanes")
    return Instantiation(
        f"store_rows {fmt} D={head_dim}{' shaped' * shaped}{changed or ''}",
        store_tokens.store_rows,
        dict.fromkeys(("first", "tiles", "rest"), "i32")
        | {"key_rot": "*bf16", "value_rot": "*bf16", "pages": "*u8"}
        | {f"{side}_{stride}_stride": "i32" for side in ("key", "value") for stride in ("token", "head")}
        | dict.fromkeys((*indices, "sink_rows", "sink_ids"), "*i64")
        | dict.fromkeys(("frame_key", "frame_value", "sink_key", "sink_value"), "*fp16")
        | _TABLES,
        _encoding(fmt, head_dim, shaped) | {"SINKS": 0 if fmt.is_raw else 1} | changed,
        lambda _: encode.launch(head_dim),
    )
