"""A layer's store to write into, and steps of every kind."""

from __future__ import annotations

from dataclasses import replace

import torch

from deltastore_kernels.context import CoarsePages, LayerStore
from deltastore_kernels.layout import NO_PAGE, TILE_TOKENS, Format, PageLayout
from deltastore_kernels.token_writes import TokenWrites
from tests.kernels.attention_case import gaussian, key_basis

HEADS, PAGE_TOKENS, PAGES, FRAMES, SINKS, SINK_TOKENS = 3, 32, 40, 6, 5, 2


def make_store(fmt: Format, head_dim: int, shaped: bool = False, coarse: Format | None = None) -> LayerStore:
    layout = PageLayout(fmt, HEADS, head_dim, PAGE_TOKENS)
    coarse_layout = coarse and replace(layout, format=coarse)
    empty = torch.full((PAGES, coarse_layout.page_bytes if coarse_layout else 0), 0xAB, dtype=torch.uint8)
    sinks = 0 if fmt.is_raw else SINKS
    return LayerStore(
        layout,
        torch.full((PAGES, layout.page_bytes), 0xAB, dtype=torch.uint8),
        *(gaussian(FRAMES, HEADS, TILE_TOKENS, head_dim, seed=seed).half() for seed in (1, 2)),
        *(torch.zeros(sinks, HEADS, SINK_TOKENS, head_dim, dtype=torch.float16) for _ in "kv"),
        key_basis(HEADS, head_dim, seed=4).shaping if shaped else None,
        coarse_layout and CoarsePages(coarse_layout, empty),
    )


def tensors(store: LayerStore) -> list[torch.Tensor]:
    coarse = store.coarse.pages if store.coarse else store.pages[:0]
    pages = torch.cat((store.pages.flatten(), coarse.flatten()))
    return [pages, store.frame_key_rot, store.frame_value_rot, store.sink_key_rot, store.sink_value_rot]


def copied(store: LayerStore) -> LayerStore:
    names = ("pages", "frame_key_rot", "frame_value_rot", "sink_key_rot", "sink_value_rot")
    coarse = store.coarse and replace(store.coarse, pages=store.coarse.pages.clone())
    return replace(store, coarse=coarse, **{name: getattr(store, name).clone() for name in names})


def a_step(tokens: int, tiles: int, seed: int, coarse: bool = False) -> TokenWrites:
    """Whole tiles of rows here and there, some from frames, some without a page, some, where there are such, to coarse
    pages; and rows that go to frames."""
    pick = torch.Generator().manual_seed(seed)

    def below(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=pick)

    sources = below(tokens, tiles, TILE_TOKENS)
    sources[below(4, tiles, TILE_TOKENS) == 0] = -1
    places = torch.randperm(2 * (PAGES - 1), generator=pick)[:tiles]
    # A lane is written once in a step.
    lanes = torch.randperm(FRAMES * TILE_TOKENS, generator=pick)[: min(tokens, 20)]
    sink_rows = below(tokens, SINKS - 1).clamp_max(tokens - SINK_TOKENS)[: max(tokens - SINK_TOKENS, 0)]
    page_ids = 1 + places // 2
    if coarse:
        page_ids = torch.where(page_ids % 2 == 0, NO_PAGE - page_ids, page_ids)
    return TokenWrites(
        tile_sources=sources,
        tile_frames=below(FRAMES, tiles),
        page_ids=torch.where(below(6, tiles) == 0, NO_PAGE, page_ids),
        tile_ids=places % 2,
        rest_rows=below(tokens, len(lanes)),
        rest_frames=lanes // TILE_TOKENS,
        rest_lanes=lanes % TILE_TOKENS,
        sink_rows=sink_rows,
        sink_ids=1 + torch.randperm(SINKS - 1, generator=pick)[: len(sink_rows)],
        takes_frames=True,
    )
