"""The page store: however tokens arrive, the same bytes lie in the same places, written once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels import ops
from deltastore_kernels.layout import RAW, TILE_TOKENS, Format, PageLayout
from deltastore_kernels.ops.store_tokens.reference import store_with
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize
from sglang_deltastore.store.writes import plan_writes

HEADS, HEAD_DIM, PAGE_TOKENS, PAGES = 2, 32, 32, 64


K4V3 = Format(4, 3)


def make_store(fmt: Format = K4V3, backend: ops.Operations | None = None) -> PageStore:
    layout = PageLayout(fmt, HEADS, HEAD_DIM, PAGE_TOKENS)
    store = PageStore(StoreSize((layout,), num_frames=4, context_tokens=512), PAGES, "cpu", backend or ops.load())
    store.pages[0].fill_(0xFF)
    return store


def pages_of(request: int, tokens: int) -> torch.Tensor:
    """Scattered page ids for a request, none shared with another request's."""
    count = -(-tokens // PAGE_TOKENS)
    return torch.tensor([(7 * (16 * request + i) + 3) % PAGES + 1 for i in range(count)], dtype=torch.int64)


def table(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(count, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    return key, value


def write_in_steps(
    store: PageStore, sequences: list[tuple[torch.Tensor, torch.Tensor]], steps: list[list[int]]
) -> None:
    """Write sequences into a store: steps[s][r] new tokens of request r in step s, its first one to sink r + 1."""
    stored = [0] * len(sequences)
    page_table = table([pages_of(r, len(key)) for r, (key, _) in enumerate(sequences)])
    for step in steps:
        active = [r for r, new in enumerate(step) if new]
        plan = plan_writes(
            prefix_tokens=torch.tensor([stored[r] for r in active]),
            new_tokens=torch.tensor([step[r] for r in active]),
            frame_ids=torch.tensor([r + 1 for r in active]),
            page_table=page_table[active],
            page_tokens=PAGE_TOKENS,
            sink_ids=torch.tensor([0 if stored[r] else r + 1 for r in active]),
        )
        rows = [slice(stored[r], stored[r] + step[r]) for r in active]
        key, value = (torch.cat([sequences[r][side][rows[i]] for i, r in enumerate(active)]) for side in (0, 1))
        store.write(0, key, value, plan)
        for r in active:
            stored[r] += step[r]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of up to three requests, and how many tokens of each arrive in each step."""
    steps = draw(
        st.lists(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), min_size=3, max_size=3), min_size=1, max_size=6)
    )
    steps = [step for step in steps if any(step)] or [[1, 0, 0]]
    return [sum(column) for column in zip(*steps, strict=True)], steps


@settings(max_examples=40, deadline=None)
@given(arrivals(), st.sampled_from([RAW, K4V3, Format(3, 2)]))
def test_bytes_do_not_depend_on_how_tokens_arrive(case: tuple[list[int], list[list[int]]], fmt: Format) -> None:
    lengths, steps = case
    sequences = [tokens(length, seed) for seed, length in enumerate(lengths)]
    stepwise, at_once = make_store(fmt), make_store(fmt)
    write_in_steps(stepwise, sequences, steps)
    write_in_steps(at_once, sequences, [lengths])

    for stored in ("pages", "sink_key_rot", "sink_value_rot"):
        assert torch.equal(getattr(stepwise, stored)[0], getattr(at_once, stored)[0])
    for r, length in enumerate(lengths):
        rest = length % TILE_TOKENS
        for side, frames in enumerate((stepwise.frame_key_rot[0], stepwise.frame_value_rot[0])):
            expected = sequences[r][side][length - rest :].half().transpose(0, 1)
            assert torch.equal(frames[r + 1, :, :rest], expected)


def test_pages_hold_the_tokens_of_their_positions() -> None:
    """A wrong page, tile, head or token order would show: raw pages give back what was written."""
    store, sequences = make_store(RAW), [tokens(100, 1), tokens(49, 2)]
    write_in_steps(store, sequences, [[37, 0], [63, 49]])
    for r, (key, value) in enumerate(sequences):
        decoded = store.ops.decode(store.pages[0], pages_of(r, len(key)), store.layouts[0])
        whole = len(key) // TILE_TOKENS * TILE_TOKENS
        for expected, got in zip((key, value), decoded, strict=True):
            assert torch.equal(got.transpose(1, 2).flatten(0, 1)[:whole], expected[:whole].half().float())


def test_only_the_named_tiles_are_touched_and_each_once() -> None:
    written: list[tuple[int, int]] = []
    real = ops.load()

    def encode(
        key: torch.Tensor, value: torch.Tensor, page_ids: torch.Tensor, tile_ids: torch.Tensor, *rest: object
    ) -> None:
        written.extend(zip(page_ids.tolist(), tile_ids.tolist(), strict=True))
        real.encode(key, value, page_ids, tile_ids, *rest)

    store = make_store(backend=replace(real, store_tokens=partial(store_with, encode)))
    write_in_steps(store, [tokens(90, 3)], [[20], *[[1]] * 70])
    pages = pages_of(0, 90).tolist()
    assert written == [(page, tile) for page in pages for tile in (0, 1)][: 90 // TILE_TOKENS]
    untouched = [page for page in range(PAGES + 1) if page not in pages]
    assert (store.pages[0][untouched] == 0xFF).all()
    assert (store.frame_key_rot[0][[0, 2, 3, 4]] == 0).all()


def test_what_overflows_float16_stays_finite() -> None:
    store = make_store(RAW)
    write_in_steps(store, [tuple(1e6 * side for side in tokens(17, 4))], [[17]])
    key, _ = store.ops.decode(store.pages[0], pages_of(0, 16), store.layouts[0])
    assert torch.isfinite(key[:, :, :16]).all()
    assert torch.isfinite(store.frame_key_rot[0]).all()


def test_store_size_counts_every_byte() -> None:
    layouts = tuple(PageLayout(Format(3, 2), 3, 64, 16) for _ in range(30))
    size = StoreSize(layouts, num_frames=8, context_tokens=8192, kernel_scratch_bytes=1_000_000)
    # 3 heads x 16 tokens x 64 dims x 16 bit x (key + value) x 30 layers
    assert size.frame_bytes == 368_640
    assert size.frames_bytes == 9 * 368_640
    assert size.bytes_per_token == 3720
    assert size.scratch_bytes == 1_000_000 + 8 * 512 * 24
    budget = 100_000_000
    held = size.tokens_within(budget)
    # 3 heads x 64 dims x 16 bit x (key + value) x 30 layers, one for every frame, every 32 pages, and nobody
    sinks_bytes = (8 + -(-held // 16 // 32) + 1) * 23_040
    assert size.sinks_bytes(held // 16) == sinks_bytes
    store_bytes = held * 3720 + size.page_bytes + size.frames_bytes + size.scratch_bytes + sinks_bytes
    assert budget - 2 * size.page_bytes < store_bytes <= budget
    assert size.tokens_within(1000) == 0


def test_a_draft_model_s_own_kv_comes_out_of_the_same_budget() -> None:
    layouts = tuple(PageLayout(Format(3, 2), 3, 64, 16) for _ in range(30))
    size = StoreSize(layouts, num_frames=8, context_tokens=8192, draft_tokens=4, draft_pool_token_bytes=23_040)
    budget = 100_000_000
    pages = size.tokens_within(budget) // 16
    assert size.draft_pool_bytes(pages) == (pages + 1) * 16 * 23_040
    store_bytes = size.pages_bytes(pages + 1, 0) + size.frames_bytes + size.scratch_bytes + size.sinks_bytes(pages)
    page_bytes = size.page_bytes + 16 * 23_040
    assert budget - 2 * page_bytes < store_bytes + size.draft_pool_bytes(pages) <= budget


@pytest.mark.parametrize("backend", ["cpu", "triton", "flashinfer"])
def test_no_kernel_but_the_reference_takes_memory_with_the_context_s_length(backend: str) -> None:
    llama_8b = [PageLayout(K4V3, 8, 128, 16)] * 32
    short, long = (ops.scratch_bytes(backend, llama_8b, tokens) for tokens in (8192, 131_072))
    assert short == long < 400 << 20
    assert ops.scratch_bytes("reference", llama_8b, 131_072) == 2 << 30


def test_store_allocates_what_its_size_says() -> None:
    store = make_store()
    assert store.pages_bytes == (PAGES + 1) * store.size.page_bytes
    assert store.frames_bytes == store.size.frames_bytes
    assert store.sinks_bytes == store.size.sinks_bytes(PAGES) == (4 + 2 + 1) * store.size.sink_bytes


@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_step_without_new_tokens_plans_nothing(page_tokens: int) -> None:
    plan = plan_writes(*(torch.tensor([n]) for n in (5, 0, 1)), torch.tensor([[3]]), page_tokens, torch.tensor([0]))
    assert len(plan.page_ids) == len(plan.rest_rows) == 0


def test_a_sequence_s_first_token_is_kept_raw_from_the_step_that_brings_it() -> None:
    """A prompt shorter than a tile has its sink before its page."""
    store, sequences = make_store(), [tokens(40, seed=1), tokens(3, seed=2)]
    write_in_steps(store, sequences, [[20, 0], [20, 3]])
    for r, sides in enumerate(sequences):
        for sinks, side in zip((store.sink_key_rot[0], store.sink_value_rot[0]), sides, strict=True):
            assert torch.equal(sinks[r + 1, :, 0], side[0].half())
    assert not any(sinks[0][[0, 3, 4, 5, 6]].any() for sinks in (store.sink_key_rot, store.sink_value_rot))


def test_a_raw_store_keeps_no_sinks() -> None:
    assert make_store(RAW).sink_table.total == 0


def test_what_stock_would_need_is_of_the_model_s_dims_and_of_what_it_keeps_behind_windows() -> None:
    layouts = tuple(PageLayout.holding(K4V3, HEADS, 80, dim, PAGE_TOKENS) for dim in (80, 48))
    whole = [PAGE_TOKENS * HEADS * (80 + dim) * 2 for dim in (80, 48)]
    assert StoreSize(layouts, num_frames=1, context_tokens=0).stock_page_bytes == sum(whole)
    size = StoreSize(layouts, num_frames=1, context_tokens=0, stock_shares=(1.0, 0.75))
    assert size.stock_page_bytes == whole[0] + 0.75 * whole[1]
