"""Pages at two levels: every page in use has its bytes, whatever begins, sinks and goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels import ops
from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import NO_PAGE, TILE_TOKENS, Format, PageLayout
from sglang_deltastore.policy.precision import first_level
from sglang_deltastore.store import steps
from sglang_deltastore.store.levels import COARSE, FINE, Levels, most_fine
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from tests import budgets
from tests.kernels.attention_case import key_basis

HEADS, HEAD_DIM, PAGE_TOKENS = 2, 32, 32


class Bytes:
    """A layer's bytes, in which a page writes its number all over."""

    def __init__(self, num_pages: int, fine_bytes: int, coarse_bytes: int) -> None:
        self.sizes = {FINE: fine_bytes, COARSE: coarse_bytes}
        self.whole = torch.zeros((num_pages + 1) * coarse_bytes, dtype=torch.int64)

    def of(self, row: int) -> torch.Tensor:
        size = self.sizes[FINE if row >= 0 else COARSE]
        start = row * size if row >= 0 else len(self.whole) + row * size
        assert start >= 0
        assert start + size <= len(self.whole)
        return self.whole[start : start + size]

    def put(self, page: int, row: int) -> None:
        self.of(row)[:] = page

    def held(self, row: int) -> int:
        (page,) = self.of(row).unique().tolist()
        return page


class Forest(list[Bytes]):
    """All layers."""

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        assert not set(sources.tolist()) & set(targets.tolist())
        for layer in self:
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                layer.put(layer.held(source), target)

    def coarsen(self, fine: torch.Tensor, moves: tuple[torch.Tensor, torch.Tensor], coarse: torch.Tensor) -> None:
        read = [[layer.held(row) for row in fine.tolist()] for layer in self]
        self.move(*moves)
        for layer, pages in zip(self, read, strict=True):
            for page, row in zip(pages, coarse.tolist(), strict=True):
                layer.put(page, row)


SIZES = st.sampled_from([((5, 3),), ((7, 5), (4, 3)), ((3, 3), (4, 2)), ((2, 2),)])
EVENTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2**30), st.booleans()), max_size=40)


@given(sizes=SIZES, num_pages=st.integers(6, 30), events=EVENTS)
@settings(max_examples=150, deadline=None)
def test_every_page_in_use_has_its_bytes(
    sizes: tuple[tuple[int, int], ...], num_pages: int, events: list[tuple[int, int, bool]]
) -> None:
    forest = Forest(Bytes(num_pages, *size) for size in sizes)
    levels = Levels(num_pages, sizes, forest, first_level)
    free, used = list(range(1, num_pages + 1)), []
    levels.free_pages = lambda: torch.tensor(free, dtype=torch.int64)
    for count, pick, gives_back in events:
        chosen = torch.Generator().manual_seed(pick)
        if gives_back or len(free) < count:
            for _ in range(min(count, len(used))):
                free.append(used.pop(int(torch.randint(len(used), (1,), generator=chosen))))
            continue
        new = [free.pop(int(torch.randint(len(free), (1,), generator=chosen))) for _ in range(count)]
        used += new
        levels.place(torch.tensor([0, *new]))  # page 0 is nobody's
        rows = levels.row_of[torch.tensor(new)]
        for layer in forest:
            for page, row in zip(new, rows.tolist(), strict=True):
                layer.put(page, row)
        if len(used) > count:
            levels.use(torch.tensor(used[:2]))
        for layer in forest:
            assert [layer.held(row) for row in levels.row_of[torch.tensor(used)].tolist()] == used
        assert levels.row_of[0] == NO_PAGE
        assert levels.errors() == ()
        assert levels.count(FINE) + levels.count(COARSE) == len(used)


def make_levels(num_pages: int = 40) -> Levels:
    """Of which 24 pages can be fine."""
    return Levels(num_pages, [(5, 3)], Forest([Bytes(num_pages, 5, 3)]), first_level)


def test_pages_are_fine_while_there_is_room() -> None:
    levels = make_levels()
    levels.place(torch.arange(1, 25))
    assert (levels.count(FINE), levels.count(COARSE), levels.demoted_pages) == (24, 0, 0)
    assert most_fine(40, [(5, 3)]) == 24


def test_new_pages_are_coarse_where_all_is_fresh_and_push_down_what_has_rested() -> None:
    levels = make_levels()
    levels.place(torch.arange(1, 25))
    levels.place(torch.arange(25, 29))  # the others were stored just now
    assert (levels.count(FINE), levels.count(COARSE)) == (24 - levels.demoted_pages, 4 + levels.demoted_pages)
    assert levels.demoted_pages == 6  # 12 bytes are wanted, and each gives 2
    levels.use(torch.arange(13, 29))
    warm = torch.arange(13, 29)[levels.row_of[13:29] >= 0]
    levels.place(torch.tensor([29]))
    assert levels.row_of[29] >= 0
    assert (levels.row_of[warm] >= 0).all(), "those that were used last stay fine"
    assert levels.demoted_pages == 9


def test_rows_that_do_not_add_up_are_told() -> None:
    levels = make_levels()
    levels.place(torch.arange(1, 31))
    levels.row_of[3] = levels.row_of[4]
    assert levels.errors() == ("1 coarse rows of pages that do not know them: [3]",)
    levels.row_of[3] = NO_PAGE
    assert levels.errors()[1:] == ("30 rows are in use, and 29 pages have one",)


def test_what_is_free_goes_before_anybody_gives_up_bits() -> None:
    levels = make_levels()
    levels.place(torch.arange(1, 25))
    levels.free_pages = lambda: torch.arange(1, 9)
    levels.place(torch.arange(25, 33))
    assert (levels.count(FINE), levels.demoted_pages) == (24, 0)


LAYOUTS = tuple(PageLayout(Format(*bits), HEADS, HEAD_DIM, PAGE_TOKENS) for bits in ((4, 3), (3, 2)))
"""Fine and coarse."""
REQUESTS, CONTEXT = 3, 256
BASES = [key_basis(HEADS, HEAD_DIM, seed=3), None]


def make_store(num_pages: int, *layouts: PageLayout, begin_at: int = FINE, backend: str = "cpu") -> PageStore:
    """Of two layers, one of them calibrated, with pages of the last layout, and of a finer one that comes before it."""
    *fine, coarse = layouts
    size = StoreSize((coarse, coarse), REQUESTS, CONTEXT, fine_layouts=(*fine, *fine))
    return PageStore(size, num_pages, "cpu", ops.load(backend), BASES, lambda *_: begin_at)


def serve(store: PageStore, seed: int = 0) -> list[torch.Tensor]:
    """What attention gives, layer by layer, for three requests: prompts in two chunks, then decode steps."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(REQUESTS * CONTEXT // PAGE_TOKENS, generator=generator) + 1
    slots = (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).int()
    req_to_token = torch.cat((torch.zeros(1, CONTEXT, dtype=torch.int32), slots.view(REQUESTS, CONTEXT)))
    rows = torch.arange(REQUESTS) + 1
    stored, found = torch.zeros(REQUESTS, dtype=torch.int64), []
    for new in ((150, 90, 180), (60, 64, 30), *[(1, 1, 1)] * 40):
        counts = torch.tensor(new)
        store.sink_table.hold({frame: frame for frame in rows.tolist()})
        if sum(new) > REQUESTS:
            plan, run = steps.plan_extend(store, req_to_token, rows, rows.tolist(), stored, counts), steps.extend
        else:
            plan, run = steps.plan_decode(store, req_to_token, rows, stored + counts), steps.decode
        for layer in range(2):
            query, key, value = (
                torch.randn(sum(new), heads, HEAD_DIM, generator=generator) for heads in (2 * HEADS, HEADS, HEADS)
            )
            found.append(run(store, layer, query, key, value, plan, Scoring(HEAD_DIM**-0.5)))
        stored = stored + counts
    return found


@pytest.mark.parametrize("level", [FINE, COARSE])
def test_a_store_whose_pages_all_stay_at_a_level_is_one_of_that_format(level: int) -> None:
    """Bit for bit."""
    two_levels = make_store(64, *LAYOUTS, begin_at=level)
    found = serve(two_levels)
    assert two_levels.levels.count(1 - level) == two_levels.levels.demoted_pages == 0
    for ours, theirs in zip(found, serve(make_store(64, LAYOUTS[level])), strict=True):
        assert torch.equal(ours, theirs)


def test_under_pressure_attention_reads_what_the_pages_hold() -> None:
    """The compiled kernels and the twin over the same events; 24 pages are owned in room for 17 fine ones."""
    stores = [make_store(24, *LAYOUTS, backend=backend) for backend in ("cpu", "reference")]
    ours, twins = map(serve, stores)
    assert stores[0].levels.demoted_pages > 0
    assert stores[0].levels.count(FINE) > 0
    assert torch.equal(stores[0].levels.row_of, stores[1].levels.row_of)
    for one, other in zip(ours, twins, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=budgets.LEVELS_ATTEND)


def test_a_page_that_sinks_is_encoded_again_from_what_it_held() -> None:
    store = make_store(8, *LAYOUTS)
    held = torch.tensor([1, 2, 3, 4])
    store.levels.place(held)
    key, value = (torch.randn(len(held), HEADS, TILE_TOKENS, HEAD_DIM) for _ in "kv")
    first_tiles = held.new_zeros(len(held))
    for layer in store.stored:
        for tile in range(PAGE_TOKENS // TILE_TOKENS):
            rows = store.levels.row_of[held]
            store.ops.encode(key, value, rows, first_tiles + tile, layer.pages, layer.layout, layer.key_shaping)
    before = [store.ops.decode(layer.pages, store.levels.row_of[held], layer.layout) for layer in store.stored]
    store.levels._demote(2)
    rows = store.levels.row_of[held]
    assert (rows < 0).sum() == 2
    for layer, sides in zip(store.stored, before, strict=True):
        twin = torch.zeros(len(held), layer.coarse.layout.page_bytes, dtype=torch.uint8)
        numbers = torch.arange(len(held))
        for tile in range(PAGE_TOKENS // TILE_TOKENS):
            tiles = [side[:, :, tile * TILE_TOKENS :][:, :, :TILE_TOKENS] for side in sides]
            store.ops.encode(*tiles, numbers, first_tiles + tile, twin, layer.coarse.layout, layer.key_shaping)
        sunk = store.ops.decode(layer.coarse.pages, rows[rows < 0] % len(layer.coarse.pages), layer.coarse.layout)
        for side, theirs in zip(sunk, store.ops.decode(twin, numbers[rows < 0], layer.coarse.layout), strict=True):
            assert torch.equal(side, theirs)
        stayed = store.ops.decode(layer.pages, rows[rows >= 0], layer.layout)
        for side, whole in zip(stayed, sides, strict=True):
            assert torch.equal(side, whole[rows >= 0])


@given(num_pages=st.integers(0, 50), fine=st.sampled_from([Format(4, 3), Format(4, 4)]))
@settings(deadline=None)
def test_what_is_allocated_is_what_was_promised(num_pages: int, fine: Format) -> None:
    layouts = replace(LAYOUTS[0], format=fine), LAYOUTS[1]
    store = make_store(num_pages, *layouts)
    assert store.pages_bytes == store.size.pages_bytes(num_pages + 1, 0)
    budget = store.pages_bytes + store.frames_bytes + store.sinks_bytes + store.size.scratch_bytes
    assert num_pages - 1 <= store.size.tokens_within(budget) // PAGE_TOKENS <= num_pages
