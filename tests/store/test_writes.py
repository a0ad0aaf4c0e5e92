"""Decode steps planned in shapes that depend on nothing write what the general plan writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels import ops
from deltastore_kernels.layout import NO_PAGE, TILE_TOKENS, Format, PageLayout
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from sglang_deltastore.store.writes import plan_decode_writes, plan_writes, without_unfinished

PAGE_TOKENS, HEADS, HEAD_DIM, REQUESTS, PAGES_EACH = 32, 2, 32, 3, 3


def make_store() -> PageStore:
    layout = PageLayout(Format(3, 2), HEADS, HEAD_DIM, PAGE_TOKENS)
    store = PageStore(StoreSize((layout,), REQUESTS, 0), REQUESTS * PAGES_EACH, "cpu", ops.load("reference"))
    store.pages[0].fill_(0xAB)
    return store


PAGE_TABLE = 1 + torch.randperm(REQUESTS * PAGES_EACH, generator=torch.Generator().manual_seed(3)).view(REQUESTS, -1)
FRAMES = torch.tensor([2, 3, 1])
NO_SINKS = torch.zeros_like(FRAMES)


def state(store: PageStore) -> list[torch.Tensor]:
    """All that belongs to somebody."""
    return [store.pages[0][1:], store.sink_key_rot[0], store.sink_value_rot[0]]


@given(
    prefix=st.lists(st.integers(0, PAGE_TOKENS * PAGES_EACH - 40), min_size=REQUESTS, max_size=REQUESTS),
    steps=st.integers(1, 20),
)
@settings(max_examples=25, deadline=None)
def test_three_ways_to_plan_a_decode_step_store_the_same(prefix: list[int], steps: int) -> None:
    stores = [make_store() for _ in range(3)]
    generator = torch.Generator().manual_seed(sum(prefix))
    total = torch.tensor(prefix)
    filled = plan_writes(torch.zeros_like(total), total, FRAMES, PAGE_TABLE, PAGE_TOKENS, FRAMES * (total > 0))
    sides = [torch.randn(int(total.sum()), HEADS, HEAD_DIM, generator=generator) for _ in "kv"]
    for store in stores:
        store.write(0, *sides, filled)
    for _ in range(steps):
        general = plan_writes(total, torch.ones_like(total), FRAMES, PAGE_TABLE, PAGE_TOKENS, NO_SINKS)
        total = total + 1
        static = plan_decode_writes(total, FRAMES, PAGE_TABLE, PAGE_TOKENS)
        key, value = (torch.randn(REQUESTS, HEADS, HEAD_DIM, generator=generator) for _ in "kv")
        for store, plan in zip(stores, (general, static, without_unfinished(static)), strict=True):
            store.write(0, key, value, plan)
    for other in stores[1:]:
        for ours, theirs in zip(state(stores[0]), state(other), strict=True):
            assert torch.equal(ours, theirs)
        for frame, waiting in zip(FRAMES.tolist(), (total % TILE_TOKENS).tolist(), strict=True):
            for side in ("frame_key_rot", "frame_value_rot"):
                ours, theirs = (getattr(store, side)[0][frame, :, :waiting] for store in (stores[0], other))
                assert torch.equal(ours, theirs)


def test_a_plan_for_a_graph_has_shapes_of_the_batch_alone() -> None:
    plans = [plan_decode_writes(torch.tensor(total), FRAMES, PAGE_TABLE, PAGE_TOKENS) for total in ([1] * 3, [16] * 3)]
    assert [x.shape for x in vars(plans[0]).values() if isinstance(x, torch.Tensor)] == [
        x.shape for x in vars(plans[1]).values() if isinstance(x, torch.Tensor)
    ]
    assert plans[0].page_ids.tolist() == [NO_PAGE] * 3
    assert plans[1].page_ids.tolist() == PAGE_TABLE[:, 0].tolist()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_tile_without_a_page_goes_nowhere(backend: str) -> None:
    layout = PageLayout(Format(4, 2), HEADS, HEAD_DIM, PAGE_TOKENS)
    pages = torch.full((3, layout.page_bytes), 0xAB, dtype=torch.uint8)
    sides = [torch.randn(2, HEADS, TILE_TOKENS, HEAD_DIM) for _ in "kv"]
    ops.load(backend).encode(*sides, torch.tensor([NO_PAGE, 1]), torch.tensor([0, 1]), pages, layout)
    assert (pages[[0, 2]] == 0xAB).all()
    assert (pages[1] != 0xAB).any()
