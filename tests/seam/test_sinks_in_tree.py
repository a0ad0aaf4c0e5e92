"""Sinks and the tree of SGLang: whatever is evicted or asked again, no cached sequence is without its sink."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_deltastore.seam.facts import censuses
from sglang_deltastore.seam.snapshot import window_counts
from sglang_deltastore.seam.tree import beginning_of
from sglang_deltastore.store.sinks import Beginning
from tests.observe.live_tree import LiveTree, P

ROWS, SINKS = 16, 19
ADAPTER = "an adapter"
FIRST_TOKENS = st.integers(0, 40)
SALTS = st.sampled_from([None, "a salt", ADAPTER])


def adapter_of(salt: str | None) -> str | None:
    """Whose first keys and values differ from the model's; a salt's are the same."""
    return salt if salt == ADAPTER else None


class Traffic(RuleBasedStateMachine):
    """Sequences with more first tokens than there are sinks, in a tree that is always full."""

    live_tree: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.live = LiveTree(num_pages=60, num_sinks=SINKS, **self.live_tree)
        self.sinks = self.live.tree.sinks
        self.content: dict[int, Beginning] = {}  # of a sink: what it was written with
        self.asked: dict[tuple[int, str | None], list[list[int]]] = defaultdict(list)
        self.fresh = count(1000)

    def admit(self, prompt: list[int], salt: str | None) -> Any:
        req = self.live.begin(prompt, salt, adapter_of(salt))
        if req is None:
            return None
        self.asked[prompt[0], salt].append(prompt)
        if sink := self.sinks.to_write(req.kv.req_pool_idx):
            assert req.kv.cache_protected_len == 0, "a cached sequence has a sink that nobody wrote"
            self.content[sink] = prompt[0], adapter_of(salt)
        self.live.prefilled(req)
        return req

    @rule(first=FIRST_TOKENS, salt=SALTS, tokens=st.integers(1, 5 * P))
    def new(self, first: int, salt: str | None, tokens: int) -> None:
        self.admit([first, *(next(self.fresh) for _ in range(tokens))], salt)

    @rule(first=FIRST_TOKENS, salt=SALTS, keep=st.integers(1, 4 * P), more=st.integers(1, 3 * P), pick=st.randoms())
    def go_on(self, first: int, salt: str | None, keep: int, more: int, pick: Any) -> None:
        if self.asked[first, salt]:
            begun = pick.choice(self.asked[first, salt])[:keep]
            self.admit([*begun, *(next(self.fresh) for _ in range(more))], salt)

    @precondition(lambda self: self.live.running)
    @rule(pick=st.randoms(), answer=st.integers(0, 3 * P))
    def end(self, pick: Any, answer: int) -> None:
        req = pick.choice(self.live.running)
        self.live.finish(req, [next(self.fresh) for _ in range(answer)])
        self.asked[req.origin_input_ids[0], req.extra_key].append(list(req.full_untruncated_fill_ids))

    @rule(tokens=st.integers(1, 10 * P))
    def evict(self, tokens: int) -> None:
        self.live.evict(tokens)

    @rule(first=FIRST_TOKENS, salt=SALTS, pick=st.randoms())
    def look(self, first: int, salt: str | None, pick: Any) -> None:
        """A request that waits: the tree may split a node for it."""
        if self.asked[first, salt]:
            self.live.match(pick.choice(self.asked[first, salt])[: pick.randrange(1, 5 * P)], salt)

    @precondition(lambda self: not self.live.running)
    @rule()
    def flush(self) -> None:
        self.live.tree.reset()
        self.live.allocator.clear()
        self.asked.clear()

    @invariant()
    def every_sequence_has_the_sink_of_its_first_token(self) -> None:
        running = {beginning_of(req) for req in self.live.running}
        stored = {
            (first, adapter_of(salt)) for (first, salt), prompts in self.asked.items()
            if any(self.live.match(prompt, salt).full_kv_hit_length for prompt in prompts)
        }  # fmt: skip
        kept = {beginning: sink.id for beginning, sink in self.sinks._sinks.items()}
        assert kept.keys() == running | stored
        assert len(set(kept.values())) == len(kept) == SINKS - self.sinks.free
        assert all(self.content[sink] == beginning for beginning, sink in kept.items())


class TrafficBehindWindows(Traffic):
    """The same where pages behind windows are freed, and run out first: of nodes too."""

    live_tree: ClassVar = {"window": 2 * P + 1, "window_pages": 30}

    @invariant()
    def every_page_has_one_owner(self) -> None:
        live, tree = self.live, self.live.tree
        counts = window_counts(live.allocator, live.running, tree)
        total, *parts = counts.values()
        assert sum(parts) == total
        tree.sanity_check()
        if live.running:
            return
        for census in censuses(tree, live.allocator):
            while (errors := census.go_on(1.0)) is None:
                pass
            assert errors == ()


TestTraffic = Traffic.TestCase
TestTrafficBehindWindows = TrafficBehindWindows.TestCase
TestTraffic.settings = TestTrafficBehindWindows.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None
)


def test_another_beginning_takes_the_oldest_one_s_sink_and_nothing_else() -> None:
    live = LiveTree(num_pages=200, num_sinks=3)
    for first in (1, 2, 3):
        for branch in range(4):
            req = live.begin([first] * (2 * P) + [10 * first + branch] * (2 * P), extra_key=str(branch % 2))
            live.prefilled(req)
            live.finish(req, [7] * P)
    stored = len(live.stored_pages())
    req = live.begin([4] * P)
    assert live.tree.sinks.evictions == 1
    assert [live.match([first] * (2 * P), "0").device_prefix_len for first in (1, 2, 3)] == [0, 2 * P, 2 * P]
    assert len(live.stored_pages()) == stored * 2 // 3
    assert live.tree.counts.evicted_tokens == stored // 3 * P
    live.tree.sanity_check()
    live.prefilled(req)
    live.finish(req, [])


@pytest.mark.parametrize("own", [True, False])
def test_embeddings_in_place_of_tokens_are_a_request_s_own(own: bool) -> None:
    live = LiveTree(num_sinks=ROWS + 1)
    requests = [live.begin([5] * P) for _ in range(2)]
    for req in requests:
        req.skip_radix_cache_insert = own
        live.tree.begin([req])
        live.tree.sinks.to_write(req.kv.req_pool_idx)
    sinks = {live.tree.sinks.of_frame(req.kv.req_pool_idx) for req in requests}
    assert len(sinks) == (2 if own else 1)
    for req in requests:
        live.tree.on_release(req, checkpointed=True)
    assert live.tree.sinks.free == ROWS + 1


def test_a_census_begins_anew_when_a_node_gives_up_pages_behind_windows() -> None:
    live = LiveTree(window=2 * P, window_pages=40)
    live.finish(live.begin(list(range(6 * P))), [])
    live.prefilled(live.begin(list(range(10 * P))))  # runs: its own window is kept, the one before it may go
    census = censuses(live.tree, live.allocator)[-1]
    version, stored = live.tree.version, live.stored_pages()
    live.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=P))
    assert live.stored_pages() == stored
    assert census.go_on(1.0) is None
    assert "lost (owned by nobody)" in census.go_on(1.0)[0], "it saw free pages of another time"
    assert live.tree.version > version
