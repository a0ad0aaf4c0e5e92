"""The hit rate by memory: with all pages sampled it is that of a prefix cache of each size, to the token."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_deltastore.observe.guard import GUARD
from sglang_deltastore.observe.hit_curve import MOST_SAMPLED, SIZES, HitCurve, page_keys
from sglang_deltastore.seam import facts
from tests.budgets import SAMPLED_HIT_RATE
from tests.observe.live_tree import LiveTree, P
from tests.observe.test_stats import scheduler

Tokens = list[int]
Pages = tuple[tuple[object, ...], ...]


def pages_of(tokens: Tokens, namespace: object = None) -> Pages:
    return tuple((namespace, *tokens[at : at + P]) for at in range(0, len(tokens) // P * P, P))


class PrefixCache:
    """Prefixes of whole pages. Who has no room gives up the least recently used that no other stored one continues."""

    def __init__(self, capacity_pages: int) -> None:
        self.capacity_pages = capacity_pages
        self.used_at: dict[Pages, int] = {}
        self.now = 0

    def find(self, pages: Pages, prompt_tokens: int) -> int:
        """Tokens of the longest stored prefix, the last token of the prompt aside; 0 where it does not fit at all."""
        if -(-prompt_tokens // P) > self.capacity_pages:
            return 0
        found = 0
        while found < (prompt_tokens - 1) // P and pages[: found + 1] in self.used_at:
            found += 1
        return found * P

    def use(self, pages: Pages) -> None:
        if len(pages) > self.capacity_pages:
            return
        self.now += 1
        for length in range(1, len(pages) + 1):
            self.used_at[pages[:length]] = self.now
        while len(self.used_at) > self.capacity_pages:
            continued = {prefix[:-1] for prefix in self.used_at}
            leaves = [prefix for prefix in self.used_at if prefix not in continued]
            del self.used_at[min(leaves, key=self.used_at.__getitem__)]


def keys_of(tokens: Tokens, namespace: object = None) -> np.ndarray:
    return page_keys(array("q", tokens), P, namespace)


def serve(curve: HitCurve, prompt: Tokens, answer: Tokens, hit_tokens: int, namespace: object = None) -> None:
    curve.asked(keys_of(prompt[:-1], namespace), len(prompt), hit_tokens)
    curve.used(keys_of(prompt, namespace))
    curve.used(keys_of([*prompt, *answer], namespace))


#: a request goes on from a beginning of an earlier context, or begins anew
requests = st.lists(
    st.tuples(
        st.integers(0, 5), st.integers(0, 40), st.lists(st.integers(0, 2), min_size=1, max_size=24),
        st.lists(st.integers(0, 2), max_size=9), st.sampled_from([None, "other"]),
    ),
    min_size=1, max_size=25,
)  # fmt: skip


@given(requests, st.integers(1, 24))
@example([(0, 0, [0] * 16, [], None), (0, 0, [1] * 8, [], None), (0, 16, [0, 0], [], None)], 5)
@example([(0, 0, [0], [0] * 7, None), (0, 8, [0] * 7, [0], "other"), (0, 4, [0], [], None)], 2)
def test_every_size_hits_what_a_cache_of_it_does(drawn: list[tuple], capacity_pages: int) -> None:
    curve = HitCurve(capacity_pages, P, rate=1.0)
    twins = {size: PrefixCache(int(capacity_pages * size)) for size in SIZES}
    found, contexts, prompt_tokens = dict.fromkeys(SIZES, 0), [[]], 0
    for back, kept, more, answer, namespace in drawn:
        prompt = [*contexts[-1 - back % len(contexts)][:kept], *more]
        hits = {}
        for size, twin in twins.items():
            hits[size] = twin.find(pages_of(prompt, namespace), len(prompt))
            found[size] += hits[size]
            twin.use(pages_of(prompt, namespace))
            twin.use(pages_of([*prompt, *answer], namespace))
        serve(curve, prompt, answer, hits[1.0], namespace)
        contexts.append([*prompt, *answer])
        prompt_tokens += len(prompt)
    assert curve.prompt_tokens == prompt_tokens
    # A context that only the larger size takes in may drive out what the smaller one keeps; what is shown never falls.
    shown = {size: (max if size > 1 else min)(hits, found[1.0]) for size, hits in found.items()}
    for rates, expected in ((curve.sampled_hit_rates(), found), (curve.hit_rates(), shown)):
        assert {size: round(rate * prompt_tokens, 6) for size, rate in rates.items()} == expected


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_pages_have_one_key_exactly_where_all_before_them_is_equal(one: Tokens, other: Tokens) -> None:
    for namespace in (None, "other"):
        equal = keys_of(one)[: len(other) // P] == keys_of(other, namespace)[: len(one) // P]
        pairs = zip(pages_of(one), pages_of(other, namespace), strict=False)
        expected = np.logical_and.accumulate([mine == theirs for mine, theirs in pairs] or [True])
        assert equal.tolist() == expected[: len(equal)].tolist()


def test_every_process_samples_the_same_pages() -> None:
    found = [page_keys(array("q", range(32)), 16, namespace).tolist() for namespace in (None, ("a", None))]
    assert found == [[886876099971838628, 9332306649803882371], [13857807052997657345, 1246694149482466681]]


def conversations(pick: random.Random, count: int, system: Tokens) -> list[Tokens]:
    """Prompts of conversations behind one system prompt, some of which are left, each turn longer than the last."""
    going, prompts = [], []
    for _ in range(count):
        if not going or pick.random() < 0.2:
            going.append(list(system))
        context = pick.choice(going[-60:])
        context += [pick.randrange(1000) for _ in range(pick.randint(20, 200))]
        prompts.append(list(context))
    return prompts


@pytest.mark.parametrize("system_tokens", [0, 400])
def test_a_tenth_of_the_pages_says_nearly_as_much(system_tokens: int) -> None:
    """A system prompt has few pages, which are hit always: what is sampled of them says little of all."""
    pick = random.Random(3)
    exact, sampled = (HitCurve(2500, P, rate=rate) for rate in (1.0, 0.1))
    present = PrefixHits(2500)
    for prompt in conversations(pick, 1500, [pick.randrange(1000) for _ in range(system_tokens)]):
        keys = keys_of(prompt)
        hit_tokens = present.serve(keys, len(prompt))
        for curve in (exact, sampled):
            curve.asked(keys[: (len(prompt) - 1) // P], len(prompt), hit_tokens)
            curve.used(keys)
    rates = exact.hit_rates()
    assert rates[8.0] - rates[0.25] > 0.3, "memory makes no difference: this tests nothing"
    for size, rate in sampled.hit_rates().items():
        assert rate == pytest.approx(rates[size], abs=SAMPLED_HIT_RATE)


class PrefixHits:
    """What a curve's own present size holds, as if it were the server."""

    def __init__(self, capacity_pages: int) -> None:
        self._curve = HitCurve(capacity_pages, P, rate=1.0)

    def serve(self, keys: np.ndarray, prompt_tokens: int) -> int:
        before = self._held()
        self._curve.asked(keys[: (prompt_tokens - 1) // P], prompt_tokens, 0)
        self._curve.used(keys)
        return self._held() - before

    def _held(self) -> int:
        return round(self._curve.sampled_hit_rates()[1.0] * self._curve.prompt_tokens)


def test_memory_is_bounded() -> None:
    curve, pick = HitCurve(1_000_000, 16), np.random.default_rng(1)
    for _ in range(40):
        curve.used(pick.integers(0, 2**64, 200_000, dtype=np.uint64))
    held = [len(cache) for cache in curve._caches]
    assert held == [MOST_SAMPLED * size / SIZES[-1] for size in SIZES]


def test_old_requests_are_forgotten() -> None:
    curve = HitCurve(64, P, rate=1.0, window_tokens=100)
    for number in range(30):
        serve(curve, [number] * 25, [], hit_tokens=0)  # nobody finds anything
    assert curve.prompt_tokens <= 200 and curve.hit_rates()[8.0] == 0.0
    for _ in range(10):
        serve(curve, [7] * 25, [], hit_tokens=24)
    assert curve.hit_rate == 24 / 25 and curve.hit_rates()[0.25] == 24 / 25


def test_the_present_is_what_was_really_found_and_no_size_contradicts_it() -> None:
    curve = HitCurve(64, P, rate=1.0)
    for _ in range(10):
        serve(curve, [7] * 25, [], hit_tokens=8)  # less than it could
    could = 9 * 24 / 250
    assert curve.hit_rates() == {size: could if size > 1 else 8 / 25 for size in SIZES}


def test_a_beginning_that_all_share_counts_though_none_of_it_is_sampled() -> None:
    curve, pick = HitCurve(400, P, rate=0.05), random.Random(2)
    system = next(
        tokens
        for tokens in ([pick.randrange(1000) for _ in range(10 * P)] for _ in range(100))
        if not (keys_of(tokens) <= curve._highest).any()
    )
    for number in range(200):
        prompt = [*system, *(pick.randrange(1000) for _ in range(2 * P + 1))]
        serve(curve, prompt, [], hit_tokens=len(system) if number else 0)
    found = 199 * len(system) / (200 * len(prompt))
    assert set(curve.sampled_hit_rates().values()) == {0.0}
    assert curve.hit_rates() == pytest.approx(dict.fromkeys(SIZES, found))


def test_nothing_asked_is_no_error() -> None:
    assert set(HitCurve(100, 16).hit_rates().values()) == {0.0}


# ---- over SGLang's tree ----
def random_traffic(live: LiveTree, pick: random.Random, count: int) -> int:
    """Requests two at a time, prompts of earlier contexts; returns prompt tokens that were found stored."""
    found, contexts = 0, [[pick.randrange(9) for _ in range(20)]]
    for _ in range(count):
        context = pick.choice(contexts[-60:])
        prompt = [*context[: pick.randint(0, len(context))], *(pick.randrange(9) for _ in range(pick.randint(1, 20)))]
        if (req := live.begin(prompt)) is None:
            continue
        found += req.cached_tokens
        live.prefilled(req)
        answer = [pick.randrange(9) for _ in range(pick.randint(0, 12))]
        live.finish(req, answer)
        if len(prompt) < 120:
            contexts.append([*prompt, *answer])
    return found


def test_what_the_tree_does_reaches_the_curve() -> None:
    """Where all fits, what sampling says of the present size is what the tree really found."""
    live, errors = LiveTree(num_pages=4000), GUARD.errors
    curve = live.tree.hit_curve = HitCurve(4000, P, rate=1.0)
    found = random_traffic(live, random.Random(5), 200)
    assert live.tree.counts.evictions == 0 and GUARD.errors == errors
    assert live.tree.counts.hit_tokens == found > 0
    assert curve.prompt_tokens == live.tree.counts.prompt_tokens
    assert round(curve.hit_rate * curve.prompt_tokens) == found
    assert round(curve.sampled_hit_rates()[1.0] * curve.prompt_tokens) == found


def test_an_overflowing_tree_against_larger_ones() -> None:
    pick, rates = 11, {}
    live = LiveTree(num_pages=96)
    curve = live.tree.hit_curve = HitCurve(96, P)
    random_traffic(live, random.Random(pick), 400)
    for size in (0.5, 2.0, 4.0):
        other = LiveTree(num_pages=int(96 * size))
        random_traffic(other, random.Random(pick), 400)
        rates[size] = other.tree.counts.hit_tokens / other.tree.counts.prompt_tokens
    assert live.tree.counts.evicted_tokens > 96 * P
    assert all(less < more for less, more in pairwise(rates.values()))
    for size, rate in rates.items():
        assert curve.hit_rates()[size] == pytest.approx(rate, abs=SAMPLED_HIT_RATE), size


def test_a_request_counts_once_and_later_chunks_do_not() -> None:
    live = LiveTree()
    curve = live.tree.hit_curve = HitCurve(64, P)
    req = live.begin([1] * 20)
    req.already_computed = 8
    live.tree.begin([req])
    req.already_computed, req.retracted_stain = 0, True
    live.tree.begin([req])
    assert curve.prompt_tokens == 20


def test_a_prompt_in_chunks_is_used_once_it_is_whole() -> None:
    live = LiveTree()
    curve = live.tree.hit_curve = HitCurve(64, P)
    req = live.begin([1] * 20)
    live.tree.checkpoint(req, up_to=8)
    assert live.tree.mirror.stored_tokens == 8 and not any(len(cache) for cache in curve._caches)
    live.prefilled(req)
    assert [len(cache) for cache in curve._caches] == [20 // P] * len(SIZES)


def test_an_emptied_tree_empties_it() -> None:
    live = LiveTree()
    curve = live.tree.hit_curve = HitCurve(64, P)
    live.finish(live.begin([1] * 20), [2])
    live.tree.reset()
    assert curve.prompt_tokens == 0 and not any(len(cache) for cache in curve._caches)


def test_should_it_fail_requests_go_on() -> None:
    live, errors = LiveTree(), GUARD.errors
    live.tree.hit_curve = HitCurve(64, P)
    live.tree.hit_curve._caches = None
    live.finish(live.begin([1] * 20), [2] * 8)
    assert live.tree.counts.requests == 1 and live.tree.mirror.stored_tokens == 28
    assert GUARD.errors == errors + 2  # looked up, and used


@pytest.mark.parametrize(("rank", "counts"), [(0, True), (1, False)])
def test_the_first_rank_counts(monkeypatch: pytest.MonkeyPatch, rank: int, counts: bool) -> None:
    live = scheduler()
    monkeypatch.setattr(facts, "get_parallel", lambda: SimpleNamespace(attn_tp_rank=rank, dp_rank=0))
    facts.attach({}, live)
    assert bool(live.tree_cache.hit_curve) is counts
    stats = live.tree_cache.facts.fresh()
    assert (stats.hit_rate_1x, stats.hit_rate_prompt_tokens) == (0.0, 0)
