"""What the compiled kernels would take for something else is refused, with words, before an address is given away."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from deltastore_kernels import _checks, native
from deltastore_kernels.context import LayerStore
from deltastore_kernels.layout import Format
from deltastore_kernels.token_writes import TokenWrites
from tests.kernels.attention_case import Case, gaussian
from tests.kernels.cpu_case import CPU, context_of, fresh_memory_is_nan, query_of
from tests.kernels.paged_context import run_decode, run_extend

assert fresh_memory_is_nan  # fixture; and its module skips where the compiled kernels are missing

CASE = Case(Format(4, 2), (97, 98), sink_tokens=1)
CONTEXT = context_of(CASE)
LAYOUT = CONTEXT.layout
QUERY = query_of(CASE)
NEW = gaussian(5, CASE.heads, CASE.head_dim, seed=1)
TILES = gaussian(3, CASE.heads, 16, CASE.head_dim, seed=2)
IDS = torch.arange(3)
SHAPING = torch.zeros(CASE.heads, CASE.head_dim, CASE.head_dim)


def every_second(x: torch.Tensor) -> torch.Tensor:
    """x, with its last dim not in one piece."""
    return torch.stack((x, x), dim=-1)[..., 0]


def decode_with(query: torch.Tensor = QUERY, **change: object) -> Callable[[], object]:
    return lambda: run_decode(CPU, query, replace(CONTEXT, **change), CASE.scoring)


def extend_with(
    new_tokens: list[int], query: torch.Tensor, key: torch.Tensor = NEW, value: torch.Tensor = NEW
) -> Callable[[], object]:
    return lambda: run_extend(CPU, query, key, value, new_tokens, CONTEXT, CASE.scoring)


def sinks_with(**change: torch.Tensor) -> Callable[[], object]:
    return decode_with(sinks=replace(CONTEXT.sinks, **change))


def decoded_to(key: torch.Tensor, value: torch.Tensor) -> Callable[[], object]:
    return lambda: native.decode(CONTEXT.pages, IDS[:1], LAYOUT, key, value)


def encoded_from(key: torch.Tensor, value: torch.Tensor, tile_ids: torch.Tensor = IDS, **rest) -> Callable[[], object]:
    return lambda: native.encode(key, value, IDS, tile_ids, CONTEXT.pages.clone(), LAYOUT, **rest)


EXTEND_QUERY = gaussian(5, CASE.heads * CASE.group, CASE.head_dim, seed=3)
ROOM = torch.zeros(CASE.heads, LAYOUT.page_tokens, CASE.head_dim)
SINK = CONTEXT.sinks.key_rot

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "pages of floats": (decode_with(pages=CONTEXT.pages.float()), "pages: given are .*float32.*must be .*uint8"),
    "pages of another size": (decode_with(pages=CONTEXT.pages[:, :-1].contiguous()), f"{LAYOUT.page_bytes}"),
    "pages in pieces": (decode_with(pages=CONTEXT.pages.T.contiguous().T), "pages: given are .*contiguous"),
    "float32 frames": (decode_with(frame_key_rot=CONTEXT.frame_key_rot.float()), "frame_key_rot: .*must be .*float16"),
    "fewer value frames": (decode_with(frame_value_rot=CONTEXT.frame_value_rot[:1]), "frame_value_rot"),
    "frames in pieces": (decode_with(frame_value_rot=every_second(CONTEXT.frame_value_rot)), "frame_value_rot"),
    "float32 sinks": (sinks_with(key_rot=SINK.float()), "sink_key_rot: .*must be .*float16"),
    "sinks in pieces": (sinks_with(value_rot=every_second(SINK)), "sink_value_rot"),
    "too many tokens in a sink": (
        decode_with(sinks=replace(CONTEXT.sinks, key_rot=SINK.repeat(1, 1, 17, 1))),
        r"sink_key_rot: .*17.*must be shape \(2, 2, 16, 64\)",
    ),
    "a short page table": (decode_with(page_table=CONTEXT.page_table[:1]), "page_table: .*matrix of 2 rows"),
    "a page table of floats": (decode_with(page_table=CONTEXT.page_table.float()), "page_table: .*integers"),
    "a page table in a row": (decode_with(page_table=CONTEXT.page_table[0]), "page_table: .*matrix"),
    "a page table elsewhere": (decode_with(page_table=CONTEXT.page_table.to("meta")), "page_table: .*meta.*CPU"),
    "few frame ids": (decode_with(frame_ids=CONTEXT.frame_ids[:1]), "frame_ids: .*vector of 2 integers"),
    "frame ids in a matrix": (decode_with(frame_ids=CONTEXT.frame_ids[:, None]), "frame_ids: .*vector"),
    "frame ids of floats": (decode_with(frame_ids=CONTEXT.frame_ids.float()), "frame_ids: .*integers"),
    "frame ids elsewhere": (decode_with(frame_ids=CONTEXT.frame_ids.to("meta")), "frame_ids: .*meta.*CPU"),
    "few frame tokens": (decode_with(frame_tokens=CONTEXT.frame_tokens[:1]), "frame_tokens: .*vector of 2 integers"),
    "few sinks": (sinks_with(ids=CONTEXT.sinks.ids[:1]), "sink_ids: .*vector of 2 integers"),
    "a query of another head_dim": (decode_with(QUERY[..., :32].contiguous()), "query_rot: .*32.*must be .*64"),
    "a query elsewhere": (decode_with(QUERY.to("meta")), "query_rot: .*meta.*CPU"),
    "more queries than requests": (decode_with(torch.cat((QUERY, QUERY))), "queries of 4 requests; the step has 2"),
    "more new requests than there are": (extend_with([1, 2, 2], EXTEND_QUERY), "queries of 3 requests; the step has 2"),
    "fewer rows than new tokens": (extend_with([3, 3], EXTEND_QUERY), "query_rot: .*each of the step's 6 new tokens"),
    "negative new tokens": (extend_with([6, -1], EXTEND_QUERY), r"new_tokens \[6, -1\]"),
    "fewer keys than queries": (extend_with([3, 2], EXTEND_QUERY, key=NEW[:4]), r"key_rot: .*must be shape \(5, 2, 64"),
    "room for halves": (decoded_to(ROOM.half(), ROOM.half()), "decode: key_rot: .*must be float32"),
    "one room for all heads": (decoded_to(ROOM[0], ROOM[0]), "decode: key_rot: .*must be float32 of shape"),
    "room elsewhere": (decoded_to(ROOM.to("meta"), ROOM.to("meta")), "decode: key_rot: .*meta.*CPU"),
    "rooms of two strides": (
        decoded_to(ROOM, ROOM.repeat(1, 2, 1)[:, : ROOM.shape[1]]),
        "decode: value_rot: .*same strides",
    ),
    "room in pieces": (decoded_to(every_second(ROOM), every_second(ROOM)), "decode: key_rot: .*one piece"),
    "room for other heads": (decoded_to(ROOM[:1], ROOM[:1]), r"decode: key_rot: .*\(2, tokens, 64\)"),
    "room for half a tile": (decoded_to(ROOM[:, :8], ROOM[:, :8]), "decode: key_rot: .*multiple of 16"),
    "room for more than there is": (decoded_to(ROOM.repeat(1, 2, 1), ROOM.repeat(1, 2, 1)), "at most 64: what 1 pages"),
    "rooms of two shapes": (decoded_to(ROOM, ROOM[:, :16]), "decode: value_rot: .*same strides"),
    "other tiles": (encoded_from(TILES[:, :1], TILES[:, :1]), r"encode: key_rot: .*must be shape \(3, 2, 16, 64\)"),
    "fewer values": (encoded_from(TILES, TILES[:2]), "encode: value_rot"),
    "tiles of two types": (encoded_from(TILES, TILES.half()), "encode: value_rot: .*keys and values alike"),
    "tiles of doubles": (encoded_from(TILES.double(), TILES.double()), "encode: key_rot: .*float16 or float32"),
    "tiles in pieces": (encoded_from(every_second(TILES), TILES), "encode: key_rot: .*one piece"),
    "fewer tile ids": (encoded_from(TILES, TILES, tile_ids=IDS[:2]), "encode: tile_ids: .*one for each of 3"),
    "tiles elsewhere": (encoded_from(TILES.to("meta"), TILES), "encode: key_rot: .*meta.*CPU"),
    "another shaping": (encoded_from(TILES, TILES, key_shaping=SHAPING[:1]), "key_shaping: .*calibrate this model"),
    "rows in pieces to rotate": (lambda: native.rotate(every_second(NEW)), "rotate: .*one piece"),
    "doubles to rotate": (lambda: native.rotate(NEW.double()), "rotate: .*float64.*must be .*bfloat16"),
    "rows elsewhere": (lambda: native.rotate(NEW.to("meta")), "rotate: .*meta.*CPU"),
    "rows of fewer heads": (
        lambda: native.store_tokens(ROW[:, :1], ROW, a_token(), a_store()),
        r"store_tokens: key_rot: .*\(1, 2, 64\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused(what: str) -> None:
    call, says = REFUSED[what]
    with pytest.raises(ValueError, match=says):
        call()


def test_what_is_right_is_taken() -> None:
    """The calls above differ from these in one thing each."""
    decode_with()()
    extend_with([3, 2], EXTEND_QUERY)()
    decoded_to(ROOM.clone(), ROOM.clone())()
    encoded_from(TILES, TILES, key_shaping=SHAPING)()
    native.rotate(NEW)


def a_store() -> LayerStore:
    frame, sink = torch.zeros(2, 2, 16, 64).half(), torch.zeros(2, 2, 4, 64).half()
    return LayerStore(LAYOUT, torch.zeros(4, LAYOUT.page_bytes, dtype=torch.uint8), frame, frame, sink, sink)


def a_token() -> TokenWrites:
    none, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tiles = {"tile_sources": none.view(0, 16), "tile_frames": none, "page_ids": none, "tile_ids": none}
    rests = {"rest_rows": one, "rest_frames": one, "rest_lanes": one}
    return TokenWrites(**tiles, **rests, sink_rows=none, sink_ids=none, takes_frames=False)


ROW = gaussian(1, 2, 64, seed=4)
STORES: dict[str, tuple[dict, dict, str]] = {
    "pages of another format": ({"pages": torch.zeros(4, 100, dtype=torch.uint8)}, {}, "pages"),
    "float32 frames": ({"frame_key_rot": torch.zeros(2, 2, 16, 64)}, {}, "frame_key_rot"),
    "frames of 8 tokens": ({"frame_value_rot": torch.zeros(2, 2, 8, 64).half()}, {}, "frame_value_rot"),
    "sinks of other heads": ({"sink_value_rot": torch.zeros(2, 1, 4, 64).half()}, {}, "sink_value_rot"),
    "a shaping of halves": ({"key_shaping": SHAPING.half()}, {}, "key_shaping"),
    "fewer lanes than rows": ({}, {"rest_lanes": torch.zeros(0, dtype=torch.int64)}, "rest_lanes"),
    "more sinks than rows for them": ({}, {"sink_ids": torch.zeros(1, dtype=torch.int64)}, "sink_ids"),
    "int32 frames of tiles": ({}, {"tile_frames": torch.zeros(0, dtype=torch.int32)}, "tile_frames"),
    "rows of 8": ({}, {"tile_sources": torch.zeros(0, 8, dtype=torch.int64)}, "tile_sources"),
}


@pytest.mark.parametrize("what", STORES)
def test_a_store_is_looked_at_before_it_is_written(what: str) -> None:
    of_store, of_writes, says = STORES[what]
    native.store_tokens(ROW, ROW, a_token(), a_store())
    with pytest.raises(ValueError, match=f"{says}: given are .*must be"):
        native.store_tokens(ROW, ROW, replace(a_token(), **of_writes), replace(a_store(), **of_store))


@pytest.mark.parametrize("module", [_checks, native], ids=lambda module: module.__name__)
def test_none_is_an_assertion(module: ModuleType) -> None:
    """`python -O` leaves assertions out."""
    tree = ast.parse(inspect.getsource(module))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []
