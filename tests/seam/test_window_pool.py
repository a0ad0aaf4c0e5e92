"""A store of two parts under SGLang's own allocator: what it frees behind windows nobody reads."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.common import free_swa_out_of_window_slots

from deltastore_kernels import native, ops
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.seam.kv_pool import DeltaWindowKVPool
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

HEADS, GROUP, HEAD_DIM, P, CONTEXT, REQUESTS = 2, 3, 64, 16, 512, 4
PAGES, SHARE = REQUESTS * CONTEXT // P, 0.5
#: layers with a window and without
WINDOW_LAYERS = (True, False, True)
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not native.available(), reason="make setup"))]


class Both:
    """The same requests over a store whose window part SGLang frees, and over one that keeps every page.

    Free pages of the window part hold bytes that no encoder writes: whoever reads one gets no number.
    """

    def __init__(self, fmt: Format, backend: str, window: int) -> None:
        layouts, kernels = (PageLayout(fmt, HEADS, HEAD_DIM, P),) * len(WINDOW_LAYERS), ops.load(backend)
        self.size = StoreSize(layouts, REQUESTS, CONTEXT, window_layers=WINDOW_LAYERS, window_share=SHARE)
        self.parted = PageStore(self.size, PAGES, "cpu", kernels)
        self.whole = PageStore(StoreSize(layouts, REQUESTS, CONTEXT), PAGES, "cpu", kernels)
        self.pool: Any = DeltaWindowKVPool.__new__(DeltaWindowKVPool)  # there is no SGLang around it
        self.pool.store = self.parted
        self.allocator = SWATokenToKVPoolAllocator(
            PAGES * P, self.parted.num_window_pages * P, P, torch.uint8, "cpu", self.pool, need_sort=False
        )
        self.req_to_token = torch.zeros(REQUESTS + 1, CONTEXT, dtype=torch.int32)
        self.window, self.kv = window, [ReqKvInfo(req_pool_idx=row) for row in range(1, REQUESTS + 1)]
        self.generator = torch.Generator().manual_seed(0)
        for store in (self.parted, self.whole):
            store.sink_table.hold({1: "a", 2: "a", 3: "b", 4: "c"})
        self.poison()

    def poison(self) -> None:
        free = [0, *self.allocator.swa_attn_allocator.get_all_free_pages().tolist()]
        for pages, is_window in zip(self.parted.pages, WINDOW_LAYERS, strict=True):
            if is_window:
                pages[free] = 0xFF

    def allocate(self, request: int, new: int) -> None:
        """A request's slots for its next tokens, as SGLang's scheduler takes them."""
        kv, row = self.kv[request], self.req_to_token[request + 1]
        before, after = (torch.tensor([tokens]) for tokens in (kv.kv_allocated_len, kv.kv_allocated_len + new))
        last = row[before - 1].long() if int(before) else torch.tensor([-1])
        slots = self.allocator.alloc_extend(before, before, after, after, last, new)
        row[kv.kv_allocated_len : kv.kv_allocated_len + new] = slots.int()
        kv.kv_allocated_len += new

    def step(self, new: dict[int, int], decode: bool) -> None:
        """Free what lies behind, take what is new, and run every layer over both stores."""
        rows, counts = sorted(new), torch.tensor([new[r] for r in sorted(new)])
        prefix = torch.tensor([self.kv[r].kv_allocated_len for r in rows])
        for r in rows:
            free_swa_out_of_window_slots(
                SimpleNamespace(kv=self.kv[r]), self.kv[r].kv_allocated_len, sliding_window_size=self.window,
                page_size=P, req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
                token_to_kv_pool_allocator=self.allocator,
            )  # fmt: skip
        self.poison()
        for r in rows:
            self.allocate(r, new[r])
        frames = torch.tensor(rows) + 1
        sides = [
            torch.randn(int(counts.sum()), heads, HEAD_DIM, generator=self.generator)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        ]
        outs = [list(self.run(store, frames, prefix, counts, sides, decode)) for store in (self.parted, self.whole)]
        for ours, theirs in zip(*outs, strict=True):
            assert ours.isfinite().all()
            assert torch.equal(ours, theirs)

    def run(
        self, store: PageStore, frames: torch.Tensor, prefix: torch.Tensor, counts: torch.Tensor, sides: Any,
        decode: bool,
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        where = (store, self.req_to_token, frames)
        plan: Any = (
            steps.plan_decode(*where, prefix + 1)
            if decode
            else steps.plan_extend(*where, frames.tolist(), prefix, counts)
        )
        attend: Any = steps.decode if decode else steps.extend
        for layer, has_window in enumerate(WINDOW_LAYERS):
            scoring = Scoring(HEAD_DIM**-0.5, window_left=self.window if has_window else None)
            yield attend(store, layer, *sides, plan, scoring)

    def hit(self, request: int, of: int, tokens: int) -> None:
        """`request` begins with the first `tokens` of another one's, whose window is still there."""
        self.req_to_token[request + 1, :tokens] = self.req_to_token[of + 1, :tokens]
        kv = self.kv[request]
        kv.kv_allocated_len = kv.cache_protected_len = tokens

    def window_pages(self, request: int) -> int:
        slots = self.allocator.full_to_swa_index_mapping[self.req_to_token[request + 1].long()]
        return len(slots[slots > 0].unique()) // P


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", [RAW, Format(4, 3)], ids=str)
@pytest.mark.parametrize("window", [5, 31, 63, 64])
def test_a_request_s_whole_life(fmt: Format, backend: str, window: int) -> None:
    both = Both(fmt, backend, window)
    both.step({0: 100, 1: 7}, decode=False)
    both.step({0: 128, 1: 30}, decode=False)  # a chunk behind which a whole window lies
    for _ in range(40):  # over tiles' ends
        both.step({0: 1, 1: 1}, decode=True)
    both.step({0: 1, 1: 1, 2: 150}, decode=False)  # a mixed batch
    assert both.window_pages(0) <= window // P + 3
    both.hit(3, 2, 144)
    both.step({3: 20, 0: 3}, decode=False)
    both.step({0: 1, 1: 1, 2: 1, 3: 1}, decode=True)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.dictionaries(st.integers(0, 2), st.integers(1, 70), min_size=1), min_size=1, max_size=6),
    st.integers(0, 70), st.sampled_from([RAW, Format(3, 2)]), st.integers(0, 20),
)  # fmt: skip
def test_any_life(chunks: list[dict[int, int]], window: int, fmt: Format, decoded: int) -> None:
    both = Both(fmt, "cpu" if native.available() else "reference", window)
    for chunk in chunks:
        both.step(chunk, decode=False)
    running = dict.fromkeys({request for chunk in chunks for request in chunk}, 1)
    for _ in range(decoded):
        both.step(running, decode=True)


def test_bytes_of_two_parts() -> None:
    both = Both(Format(4, 3), "reference", 31)
    page_bytes = both.size.layouts[0].page_bytes
    window_pages = int(PAGES * SHARE)
    assert [len(pages) for pages in both.parted.pages] == [window_pages + 1, PAGES + 1, window_pages + 1]
    assert both.size.bytes_per_token == (1 + 2 * SHARE) * page_bytes / P
    assert both.parted.pages_bytes == both.size.pages_bytes(PAGES + 1, window_pages + 1)
    budget = both.parted.pages_bytes + both.size.frames_bytes + both.size.scratch_bytes + both.size.sinks_bytes(PAGES)
    assert PAGES - 2 <= both.size.tokens_within(budget) // P <= PAGES
