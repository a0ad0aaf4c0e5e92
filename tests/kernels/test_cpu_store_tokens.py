"""The compiled store_tokens against its twin: pages, frames and sinks after steps of every kind."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from deltastore_kernels import native
from deltastore_kernels.context import LayerStore
from deltastore_kernels.layout import NO_PAGE, RAW, TILE_TOKENS, Format, PageLayout
from deltastore_kernels.ops.store_tokens import cpu, reference
from deltastore_kernels.token_writes import TokenWrites
from tests import budgets
from tests.kernels.attention_case import gaussian, key_basis
from tests.kernels.cpu_case import isa

assert isa  # fixture

FORMATS, HEAD_DIMS = (Format(4, 3), Format(3, 2), RAW), (32, 64, 96, 128, 256, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, PAGE_TOKENS, PAGES, FRAMES, SINKS, SINK_TOKENS = 3, 32, 40, 6, 5, 2


def make_store(fmt: Format, head_dim: int, shaped: bool = False) -> LayerStore:
    layout = PageLayout(fmt, HEADS, head_dim, PAGE_TOKENS)
    sinks = 0 if fmt.is_raw else SINKS
    return LayerStore(
        layout,
        torch.full((PAGES, layout.page_bytes), 0xAB, dtype=torch.uint8),
        *(gaussian(FRAMES, HEADS, TILE_TOKENS, head_dim, seed=seed).half() for seed in (1, 2)),
        *(torch.zeros(sinks, HEADS, SINK_TOKENS, head_dim, dtype=torch.float16) for _ in "kv"),
        key_basis(HEADS, head_dim, seed=4).shaping if shaped else None,
    )


def tensors(store: LayerStore) -> list[torch.Tensor]:
    return [store.pages, store.frame_key_rot, store.frame_value_rot, store.sink_key_rot, store.sink_value_rot]


def copied(store: LayerStore) -> LayerStore:
    names = ("pages", "frame_key_rot", "frame_value_rot", "sink_key_rot", "sink_value_rot")
    return replace(store, **{name: getattr(store, name).clone() for name in names})


def a_step(tokens: int, tiles: int, seed: int) -> TokenWrites:
    """Whole tiles of rows here and there, some from frames, some without a page; and rows that go to frames."""
    pick = torch.Generator().manual_seed(seed)

    def below(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=pick)

    sources = below(tokens, tiles, TILE_TOKENS)
    sources[below(4, tiles, TILE_TOKENS) == 0] = -1
    places = torch.randperm(2 * (PAGES - 1), generator=pick)[:tiles]
    # A lane is written once in a step.
    lanes = torch.randperm(FRAMES * TILE_TOKENS, generator=pick)[: min(tokens, 20)]
    sink_rows = below(tokens, SINKS - 1).clamp_max(tokens - SINK_TOKENS)[: max(tokens - SINK_TOKENS, 0)]
    return TokenWrites(
        tile_sources=sources,
        tile_frames=below(FRAMES, tiles),
        page_ids=torch.where(below(6, tiles) == 0, NO_PAGE, 1 + places // 2),
        tile_ids=places % 2,
        rest_rows=below(tokens, len(lanes)),
        rest_frames=lanes // TILE_TOKENS,
        rest_lanes=lanes % TILE_TOKENS,
        sink_rows=sink_rows,
        sink_ids=1 + torch.randperm(SINKS - 1, generator=pick)[: len(sink_rows)],
        takes_frames=True,
    )


def check_equal(ours: LayerStore, twins: LayerStore) -> None:
    pages, *raw = zip(tensors(ours), tensors(twins), strict=True)
    differ = int((pages[0] != pages[1]).sum())
    assert differ <= (0 if ours.layout.format.is_raw else 1 + budgets.BACKEND_CODES_DIFFER * pages[0].numel())
    for mine, theirs in raw:
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("fmt", "head_dim", "dtype"),
    list(
        product((Format(4, 3), Format(3, 2), RAW), (32, 64, 128, 256), (torch.float32, torch.bfloat16, torch.float16))
    ),
    ids=str,
)
def test_it_stores_what_the_twin_stores(fmt: Format, head_dim: int, dtype: torch.dtype, isa: str) -> None:
    for seed, (tokens, tiles) in enumerate([(1, 0), (1, 1), (37, 9), (200, 30)]):
        # Keys and values are slices of one projection, as models give them.
        both = gaussian(tokens, 2 * HEADS, head_dim, seed=seed).to(dtype)
        key, value = both[:, :HEADS], both[:, HEADS:]
        ours = make_store(fmt, head_dim)
        twins = copied(ours)
        writes = a_step(tokens, tiles, seed)
        cpu.store_tokens(key, value, writes, ours)
        reference.store_tokens(key, value, writes, twins)
        check_equal(ours, twins)


def test_shaped_keys_and_bad_numbers(isa: str) -> None:
    ours = make_store(Format(3, 2), 64, shaped=True)
    twins = copied(ours)
    key, value = gaussian(40, HEADS, 64, seed=8), gaussian(40, HEADS, 64, seed=9)
    key[3, 1, 5], value[7, 0, 2], key[9, 2] = float("nan"), float("inf"), 1e6
    writes = a_step(40, 12, seed=3)
    cpu.store_tokens(key, value, writes, ours)
    reference.store_tokens(key, value, writes, twins)
    for mine, theirs in list(zip(tensors(ours), tensors(twins), strict=True))[1:]:
        assert torch.equal(mine[1:], theirs[1:])
        assert mine.isfinite().all()
    assert (ours.pages != twins.pages).float().mean() <= budgets.BACKEND_SHAPED_VECTORS_DIFFER


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_ids", PAGES), ("page_ids", -2), ("tile_ids", 2), ("tile_frames", FRAMES), ("tile_sources", 37),
        ("rest_rows", 37), ("rest_frames", -1), ("rest_lanes", 16), ("sink_rows", 36), ("sink_ids", SINKS),
    ],
)  # fmt: skip
def test_what_points_outside_is_refused_before_anything_is_written(name: str, value: int) -> None:
    writes, store = a_step(37, 9, seed=2), make_store(Format(4, 2), 64)
    writes.tile_sources[:, 0] = -1  # every tile takes something of its frame
    getattr(writes, name).view(-1)[-1] = value
    before = copied(store)
    key = gaussian(37, HEADS, 64, seed=1)
    with pytest.raises(ValueError, match=str(abs(value))):
        cpu.store_tokens(key, key, writes, store)
    for mine, was in zip(tensors(store), tensors(before), strict=True):
        assert torch.equal(mine, was)


def test_rows_of_another_shape_are_refused() -> None:
    writes, store = a_step(4, 1, seed=2), make_store(Format(4, 2), 64)
    with pytest.raises(ValueError, match="must be"):
        native.store_tokens(torch.zeros(4, HEADS + 1, 64), torch.zeros(4, HEADS, 64), writes, store)
    with pytest.raises(ValueError, match="rest_rows"):
        bad = replace(writes, rest_rows=writes.rest_rows.int())
        cpu.store_tokens(torch.zeros(4, HEADS, 64), torch.zeros(4, HEADS, 64), bad, store)
