"""The replay: figures worked by hand, and a plain simulation on the plain tree that finds the same hits."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.fleet.formats import Request
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.prefix_tree import block_sequence, partial_block
from sglang_deltastore.fleet.replay import Costs, Durations, Replay, Storage, replay
from tests.fleet.test_tree import PlainTree

PAGE = 4


def request(*ids: int, extra: int = 1, answer: int = 1, at: float = 0.0, stored: tuple[int, ...] | None = None):
    """A prompt of whole pages `ids` and `extra` tokens of the next one."""
    known = None if stored is None else block_sequence(stored)
    return Request(at, len(ids) * PAGE + extra, answer, block_sequence(ids), known)


def hits(requests: list[Request], pages: int | None, **options: int) -> int:
    return replay(requests, [Replay(Cache(pages, PAGE, **options))])[0].hit_tokens


def test_a_prompt_hits_what_an_earlier_one_left() -> None:
    (outcome,) = replay([request(1, 2), request(1, 2, 3), request(1, 5)], [Replay(Cache(None, PAGE))])
    assert (outcome.prompt_tokens, outcome.hit_tokens) == (9 + 13 + 9, 8 + 4)
    assert outcome.resident_pages == 4  # 1, 2, 3, 5
    assert outcome.hit_rate == 12 / 31
    assert outcome.block_references == 2 + 3 + 2


def test_the_last_token_is_always_computed() -> None:
    """A prompt of exactly two pages, twice: one page hits, the last one is computed again."""
    assert hits([request(1, 2, extra=0), request(1, 2, extra=0)], None) == 4


def test_room_is_one_page_more_than_the_prompt_takes() -> None:
    # Two prompts of 3 pages each (two whole ones stay): the second needs 3 + 1 free of 5 with 2 resident, so 1, 2 go.
    requests = [request(1, 2), request(3, 4), request(1, 2)]
    assert hits(requests, 5) == 0
    # With 6 pages, 2 resident and 4 free, nothing goes; the third finds its two pages.
    assert hits(requests, 6) == 8


def test_the_least_recently_used_leaf_goes_first() -> None:
    # 7 pages hold 1, 2, 3 (a page each). 1 is used again; the next prompt of 4 pages + 1 to spare evicts one: 2.
    before = [request(1), request(2), request(3), request(1)]
    assert hits([*before, request(7, 8, 9), request(1)], 7) == 4 + 4
    assert hits([*before, request(7, 8, 9), request(3)], 7) == 4 + 4
    assert hits([*before, request(7, 8, 9), request(2)], 7) == 4


def test_a_node_goes_whole_and_chunks_make_nodes() -> None:
    """One prompt of four pages, then one that needs a single page: all four go, or with chunks of a page only one."""
    requests = [request(1, 2, 3, 4), request(9), request(1, 2, 3, 4)]
    assert hits(requests, 6) == 0
    assert hits(requests, 6, chunk_tokens=PAGE) == 3 * PAGE


def test_answers_take_room_and_are_hit_where_the_trace_knows_them() -> None:
    # Prompt: 1 page + 1 token; answer of 8 tokens, 7 of them stored: 12 tokens, so pages 1, 2, 3.
    first = request(1, answer=8, stored=(1, 2, 3))
    assert hits([first, request(1, 2, 3)], None) == 12
    assert hits([request(1, answer=8), request(1, 2, 3)], None) == 4


def test_what_is_larger_than_the_cache_is_refused_and_computed_nowhere() -> None:
    (outcome,) = replay([request(1, 2, 3), request(1)], [Replay(Cache(3, PAGE))])
    assert (outcome.rejected_requests, outcome.rejected_tokens) == (1, 13)
    assert (outcome.requests, outcome.hit_tokens, outcome.computed_tokens) == (2, 0, 13 + 5)


def test_partial_blocks_hold_their_whole_pages() -> None:
    cache = Cache(None, PAGE, pages_per_block=4)
    blocks = block_sequence((5,)) + partial_block(6, 3, 4)  # 16 + 12 tokens, of a prompt of 30
    once, twice = Request(0.0, 30, 1, blocks), Request(1.0, 30, 1, blocks)
    (outcome,) = replay([once, twice], [Replay(cache)])
    assert (outcome.hit_tokens, outcome.resident_pages) == (28, 7)


def test_sharing_is_temporal_times_across() -> None:
    """A conversation of three turns and another user behind the same first block: 1; 1 2; 1 2 3; 1 9."""
    endless = Replay(Cache(None, PAGE))
    replay([request(1), request(1, 2), request(1, 2, 3), request(1, 9)], [endless])
    sharing = endless.sharing()
    assert sharing.factor == 8 / 4  # 8 references, 4 different blocks
    assert sharing.temporal == 8 / 5  # two leaves, 1 2 3 and 1 9
    assert sharing.across == 5 / 4


def test_sharing_leaves_partial_blocks_out() -> None:
    endless = Replay(Cache(None, PAGE, pages_per_block=2))
    tail = partial_block(7, 1, 2)
    first, second = block_sequence((1,)) + tail, block_sequence((1, 2))
    replay([Request(0.0, 13, 1, first), Request(1.0, 17, 1, second)], [endless])
    assert (endless.sharing().factor, endless.sharing().temporal) == (3 / 2, 3 / 2)


class TestTimed:
    COSTS = Costs(prefill_tokens_per_s=10, decode_tokens_per_s=4, stream_tokens_per_s=2)

    def waits(self, requests: list[Request], pages: int | None = None, workers: int = 1) -> tuple[float, float]:
        costs = Costs(10, 4, 2, workers)
        (outcome,) = replay(requests, [Replay(Cache(pages, PAGE), costs)])
        return outcome.ttft_mean_s, outcome.ttft_p99_s

    def test_a_queue_of_two(self) -> None:
        # 9 tokens: 0.9 s of prefill, 4 answer tokens: 1 s of the GPU. The second, 5 tokens, comes at 0.5 and starts
        # at 1.9: first token at 2.4, a wait of 1.9 s.
        mean, longest = self.waits([request(1, 2, answer=4), request(8, at=0.5)])
        assert mean == pytest.approx((0.9 + 1.9) / 2)
        assert longest == pytest.approx(1.9, rel=0.006)

    def test_a_second_worker_takes_the_second(self) -> None:
        mean, _ = self.waits([request(1, 2, answer=4), request(8, at=0.5)], workers=2)
        assert mean == pytest.approx((0.9 + 0.5) / 2)

    def test_a_hit_shortens_the_wait(self) -> None:
        # At 10 s the first is long done: 8 of 9 tokens hit.
        mean, _ = self.waits([request(1, 2), request(1, 2, at=10)])
        assert mean == pytest.approx((0.9 + 0.1) / 2)

    def test_what_is_not_computed_yet_cannot_be_hit(self) -> None:
        mean, _ = self.waits([request(1, 2), request(1, 2, at=0.5)], workers=2)
        assert mean == pytest.approx(0.9)

    def test_running_requests_keep_their_pages(self) -> None:
        # 6 pages. The first takes 2 + 2 for 9 stored answer tokens and ends at 0.5 + 10/2 = 5.5 s. The second needs
        # 3 + 1 to spare and only 2 are left: it starts at 5.5 though the worker is free at 0.5 + 10/4 = 3 s.
        mean, _ = self.waits([request(1, answer=10), request(7, 8, at=1)], pages=6)
        assert mean == pytest.approx((0.5 + (5.5 + 0.9 - 1)) / 2)

    def test_a_request_that_never_fits_does_not_block_the_queue(self) -> None:
        costs = Costs(10, 4, 2)
        (outcome,) = replay([request(1, 2, 3), request(1)], [Replay(Cache(3, PAGE), costs)])
        assert (outcome.rejected_requests, outcome.ttft_mean_s) == (1, 0.5)
        # who is refused waits forever: of two requests the slower half
        assert (outcome.ttft_p50_s, outcome.ttft_p90_s) == (pytest.approx(0.5, rel=0.006), math.inf)

    @pytest.mark.parametrize("field", range(4))
    def test_rates_must_be_positive(self, field: int) -> None:
        rates = [10.0, 4.0, 2.0, 1]
        rates[field] = 0
        with pytest.raises(ValueError, match="must be more than 0"):
            Costs(*rates)


def behind(*pages: int, page_s: float = 0.0) -> list[Storage]:
    return [Storage(Cache(each, PAGE), page_s) for each in pages]


def test_what_the_cache_has_let_go_is_loaded() -> None:
    # 4 pages hold one prompt of two pages and a part of one, 9 both, 12 all three.
    requests = [request(1, 2), request(3, 4), request(1, 2), request(1, 2), request(5, 6), request(3, 4)]
    (outcome,) = replay(requests, [Replay(Cache(4, PAGE), storages=behind(9, 12))])
    assert (outcome.hit_tokens, outcome.loaded_tokens) == (8, (16, 0))
    assert outcome.computed_tokens == 6 * 9 - 8 - 16
    assert outcome.hit_rate == pytest.approx(24 / 54)


def test_loading_takes_its_time() -> None:
    # Nine tokens at 10 a second, and at last one token and two pages at 0.05 s each; nobody waits for anybody.
    requests = [request(1, 2), request(3, 4, at=10), request(1, 2, at=20)]
    storages = behind(12, page_s=0.05)
    (outcome,) = replay(requests, [Replay(Cache(4, PAGE), Costs(10, 4, 2), storages)])
    assert outcome.loaded_tokens == (8,)
    assert outcome.ttft_mean_s == pytest.approx((0.9 + 0.9 + 0.1 + 2 * 0.05) / 3)


def test_what_is_not_computed_yet_cannot_be_loaded() -> None:
    requests = [request(1, 2), request(1, 2, at=0.5), request(1, 2, at=20)]
    (outcome,) = replay(requests, [Replay(Cache(20, PAGE), Costs(10, 4, 2, workers=2), behind(20))])
    assert (outcome.hit_tokens, outcome.loaded_tokens) == (8, (0,))


def test_resident_samples_are_bounded_and_in_order() -> None:
    (outcome,) = replay([request(i, at=float(i)) for i in range(5000)], [Replay(Cache(None, PAGE))])
    times = [time_s for time_s, _ in outcome.resident]
    assert 100 < len(times) <= 256 and times == sorted(times) and times[-1] > 4900
    assert all(pages == time_s + 1 for time_s, pages in outcome.resident)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) <= 2 * min(gaps)


def test_quantiles_are_within_one_percent() -> None:
    durations = Durations()
    for milliseconds in range(1, 1001):
        durations.add(milliseconds / 1000)
    assert durations.quantile_s(0.9) == pytest.approx(0.9, rel=0.01)
    assert durations.mean_s() == pytest.approx(0.5005)
    assert math.isnan(Durations().quantile_s(0.5))


@pytest.mark.parametrize("options", [{"capacity_pages": 0}, {"capacity_pages": -3}])
def test_a_cache_holds_at_least_a_page(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="larger budget"):
        Cache(page_tokens=PAGE, **options)


PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=6).map(tuple), st.integers(0, 3), st.integers(1, 9)), max_size=30
)


@settings(max_examples=300, deadline=None)
@given(PROMPTS, st.integers(3, 14))
def test_hits_are_those_of_a_plain_simulation(prompts: list[tuple[tuple[int, ...], int, int]], pages: int) -> None:
    requests = [request(*ids, extra=extra, answer=answer) for ids, extra, answer in prompts if ids or extra]
    (outcome,) = replay(requests, [Replay(Cache(pages, PAGE))])
    hit_pages = rejected = 0
    tree = PlainTree()
    for each in requests:
        ids = tuple(memoryview(each.blocks).cast("q"))
        prompt_pages = math.ceil(each.prompt_tokens / PAGE)
        final_pages = math.ceil((each.prompt_tokens + each.answer_tokens - 1) / PAGE)
        usable = ids[: (each.prompt_tokens - 1) // PAGE]
        found = tree.match(usable)
        # Everything but the path is evictable: the peak is all the pages of this request and one to spare.
        if final_pages + 1 > pages:
            rejected += 1
            continue
        hit_pages += len(found)
        tree.lock(found, by=1)
        make_room(tree, pages, prompt_pages - len(found) + 1)
        tree.lock(found, by=-1)
        tree.insert(ids)
        tree.lock(ids, by=1)
        if each.answer_tokens > 1:
            before_last = math.ceil((each.prompt_tokens + each.answer_tokens - 2) / PAGE)
            make_room(tree, pages, before_last - len(ids) + 1)
        tree.lock(ids, by=-1)
    assert (outcome.hit_tokens, outcome.rejected_requests) == (hit_pages * PAGE, rejected)
    assert outcome.resident_pages == tree.size()


@settings(max_examples=200, deadline=None)
@given(PROMPTS, st.integers(4, 20), st.integers(0, 20), st.integers(0, 40))
def test_a_prompt_finds_what_the_level_with_most_of_it_has(
    prompts: list[tuple[tuple[int, ...], int, int]], pages: int, host_more: int, disk_more: int
) -> None:
    requests = [request(*ids, extra=extra, answer=answer) for ids, extra, answer in prompts if ids or extra]
    sizes = (pages, pages + host_more, pages + host_more + disk_more)
    (outcome,) = replay(requests, [Replay(Cache(pages, PAGE), storages=behind(*sizes[1:]))])
    device, *storages = (Cache(size, PAGE) for size in sizes)
    first = most = 0
    for each in requests:
        if (hit := hit_pages(device, each)) is not None:
            first += hit
            most += max(hit, *(hit_pages(behind_it, each) or 0 for behind_it in storages))
    assert outcome.hit_tokens == first * PAGE
    assert outcome.hit_tokens + sum(outcome.loaded_tokens) == most * PAGE
    assert outcome.prompt_tokens == sum((outcome.hit_tokens, *outcome.loaded_tokens, outcome.computed_tokens))


def hit_pages(cache: Cache, each: Request) -> int | None:
    """Of a request that comes and goes alone; None: it does not fit."""
    if running := cache.admit(each):
        cache.prefilled(running)
        cache.finish(running)
    return running and running.hit_pages


def make_room(tree: PlainTree, pages: int, needed: int) -> None:
    if (short := needed - (pages - tree.size())) > 0:
        tree.evict(short)


@settings(max_examples=200, deadline=None)
@given(PROMPTS)
def test_an_endless_cache_hits_every_prefix_seen_before(prompts: list[tuple[tuple[int, ...], int, int]]) -> None:
    requests = [request(*ids, extra=extra) for ids, extra, _ in prompts if ids or extra]
    seen: set[tuple[int, ...]] = set()
    expected = 0
    for each in requests:
        ids = tuple(memoryview(each.blocks).cast("q"))
        usable = (each.prompt_tokens - 1) // PAGE
        expected += max((n for n in range(len(ids[:usable]) + 1) if not n or ids[:n] in seen), default=0) * PAGE
        seen |= {ids[:n] for n in range(1, len(ids) + 1)}
    (outcome,) = replay(requests, [Replay(Cache(None, PAGE))])
    assert (outcome.hit_tokens, outcome.resident_pages) == (expected, len(seen))
