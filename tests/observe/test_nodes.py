"""The mirror over SGLang's real tree: after every event its sums are those of plain sets of paths."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_deltastore.observe.guard import GUARD, Guard
from sglang_deltastore.observe.picture import RunningContext, picture
from sglang_deltastore.seam import tree as tree_module
from sglang_deltastore.seam.snapshot import untracked_tokens
from tests.observe.live_tree import LiveTree, P
from tests.observe.twin import Path, Twin

OPERATIONS = ("match", "begin", "prefilled", "finish", "ask", "ask", "evict", "look")


class Both:
    """A real tree and its twin."""

    def __init__(self, num_pages: int = 64, show_prompts: bool = False, for_head: bool = False) -> None:
        self.live, self.twin = LiveTree(num_pages, show_prompts, for_head=for_head), Twin(P)
        #: tokens behind a page that tell it from others
        self.next_tokens = int(for_head)
        self.path_of_page: dict[int, Path] = {}
        self.errors = GUARD.errors

    def path(self, tokens: list[int], extra_key: str | None) -> Path:
        ends = range(P, len(tokens) - self.next_tokens + 1, P)
        pages = [tuple(tokens[end - P : end + self.next_tokens]) for end in ends]
        return tuple((extra_key, *page) for page in pages)

    def note(self, req: object) -> None:
        """A request's whole pages are in the tree."""
        path = self.path(list(req.full_untruncated_fill_ids[: req.kv.kv_allocated_len]), req.extra_key)
        self.twin.stored(path)
        self.path_of_page |= dict(
            zip(self.live.pages_of(req)[: len(path)], [path[: at + 1] for at in range(len(path))], strict=True)
        )

    def settle(self) -> None:
        """What the tree has given up the twin gives up, too."""
        kept = {self.path_of_page[page] for page in self.live.stored_pages()}
        self.twin.pages = {path: record for path, record in self.twin.pages.items() if path in kept}
        self.twin.running = []
        for req in self.live.running:
            stored = req.kv.cache_protected_len
            path = self.path(list(req.full_untruncated_fill_ids[: stored + self.next_tokens]), req.extra_key)
            self.twin.running.append((path, req.kv.kv_allocated_len - stored))

    def look(self) -> None:
        """Compare everything."""
        self.settle()
        tree, twin = self.live.tree, self.twin
        for req in self.live.running:
            tree.know(req)
        running = [
            RunningContext(
                req.last_node if req.kv.cache_protected_len else 0, req.kv.kv_allocated_len - req.kv.cache_protected_len
            )
            for req in self.live.running
        ]
        seen = picture(tree.mirror, running)
        assert GUARD.errors == self.errors
        assert seen.contexts == len(twin.contexts())
        assert seen.conversations == len(twin.conversations())
        assert seen.logical_tokens == twin.logical_tokens()
        assert seen.conversation_tokens == twin.conversation_tokens()
        assert seen.stored_tokens == twin.stored_tokens()
        assert tree.mirror.shared_tokens == twin.shared_tokens()
        assert tree.mirror.stored_tokens == tree.full_evictable_size() + tree.full_protected_size()
        self.look_at_nodes(seen.nodes)

    def look_at_nodes(self, nodes: tuple) -> None:
        mirror = self.live.tree.mirror
        assert {node.id for node in nodes} == set(mirror.nodes), "so few are all shown"
        assert sum(node.tokens for node in nodes) == mirror.stored_tokens
        for node in nodes:
            slots = self.live.tree.slots_of(mirror.nodes[node.id])
            path = self.path_of_page[int(slots[-1]) // P]
            assert len(slots) == node.tokens
            expected = self.twin.node(path, node.start_tokens // P)
            assert {name: getattr(node, name) for name in expected} == expected
            assert node.children == sum(other.parent == node.id for other in nodes)
            if mirror.nodes[node.id].token_ids is not None:
                assert node.first_token_ids == path[node.start_tokens // P][1 : 1 + P]

    # ---- what can happen ----
    def do(self, operation: str, tokens: list[int], extra_key: str | None, pick: int) -> None:
        if operation == "match":
            self.live.match(tokens, extra_key)
        elif operation == "begin":
            self.live.begin(tokens, extra_key)
        elif operation == "ask":
            if self.live.begin(tokens, extra_key):
                self.do("finish", tokens, extra_key, len(self.live.running) - 1)
        elif operation == "evict":
            self.live.evict(pick * P)
        elif self.live.running and operation in ("prefilled", "finish"):
            req = self.live.running[pick % len(self.live.running)]
            if operation == "prefilled":
                self.live.prefilled(req)
            else:
                self.live.make_room(len(tokens[: pick + 1]))
                self.settle()  # what made room for the answer is given up before the request is stored
                self.live.finish(req, tokens[: pick + 1])
            self.note(req)
            if operation == "finish":
                self.settle()
                path = self.path(list(req.full_untruncated_fill_ids[: req.kv.kv_allocated_len]), req.extra_key)
                self.twin.ended(path, req.cached_tokens, len(req.origin_input_ids))
        else:
            self.look()


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=8).map(
    lambda pages: [token for page in pages for token in (page, 7, 8, 9)][
        : 4 * len(pages) - pages[-1] * (len(pages) % 4)
    ]
)
steps = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), tokens, st.sampled_from([None, None, None, "other"]), st.integers(0, 6)),
    max_size=40,
)


A = [0, 7, 8, 9]
ROOM_FROM_ITS_OWN_PREFIX = [
    ("begin", A * 2, None, 0),
    ("begin", A * 8, None, 0),
    ("ask", A, None, 0),
    ("ask", A, None, 0),
]
"""An answer takes the room of the very page that the request then stores anew."""


@settings(deadline=None, max_examples=300)
@given(steps, st.booleans(), st.sampled_from([12, 64]), st.booleans())
@example(ROOM_FROM_ITS_OWN_PREFIX, False, 12, False)
def test_the_mirror_is_its_twin_after_every_event(
    steps: list[tuple[str, list[int], str | None, int]], show_prompts: bool, num_pages: int, for_head: bool
) -> None:
    both = Both(num_pages, show_prompts, for_head)
    for step in steps:
        both.do(*step)
        both.look()


@settings(deadline=None, max_examples=200)
@given(steps, st.booleans())
def test_what_nobody_looks_at_in_between(steps: list[tuple[str, list[int], str | None, int]], show: bool) -> None:
    """Looking learns of running requests' nodes: without it splits are found later, and several at once."""
    both = Both(64, show)
    for step in steps:
        both.do(*step)
        both.settle()
    both.look()


def ask(live: LiveTree, prompt: list[int], output: list[int] = [1, 1, 1, 1]) -> None:  # noqa: B006 (never changed)
    live.finish(live.begin(prompt), output)


def test_a_split_leaves_hits_to_both_halves_and_the_prompts_end_to_the_right_one() -> None:
    both = Both()
    stem = [1, 2, 3, 4] * 4
    for _ in range(3):
        ask(both.live, stem)
    mirror = both.live.tree.mirror
    seen = sorted((node.start, node.end, node.hits, node.prompt_ends) for node in mirror.order)
    assert seen == [(0, 12, 2, ()), (12, 16, 0, (12,)), (16, 20, 0, ())]
    ask(both.live, [*stem[:8], 9, 9, 9, 9])
    counted = sorted((node.start, node.end, node.hits, node.requests) for node in mirror.order if node.end <= 12)
    assert counted == [(0, 8, 3, 4), (8, 12, 0, 1), (8, 12, 2, 3)]


def test_pages_that_differ_in_the_token_behind_them_are_two_where_a_head_drafts() -> None:
    live, errors, stem = LiveTree(for_head=True), GUARD.errors, [1, 2, 3, 4] * 4
    for next_token in (8, 9, 8, 7):
        ask(live, [*stem, next_token, 5])
    assert GUARD.errors == errors
    nodes = sorted((node.start, node.end) for node in live.tree.mirror.order)
    assert nodes[:4] == [(0, 12), *[(12, 16)] * 3]
    assert untracked_tokens(live.tree) == 0


def test_a_mirror_that_lost_track_says_so_and_heals() -> None:
    live = LiveTree()
    ask(live, [1, 2, 3, 4] * 3)
    ask(live, [5, 6, 7, 8] * 3)
    tree = live.tree
    tree.mirror.clear()  # as after an event that failed
    assert untracked_tokens(tree) == 8 * P
    ask(live, [1, 2, 3, 4] * 3)
    assert untracked_tokens(tree) == 4 * P
    live.evict(100 * P)
    assert untracked_tokens(tree) == tree.mirror.stored_tokens == 0
    ask(live, [5, 6, 7, 8] * 3)
    assert (untracked_tokens(tree), tree.mirror.stored_tokens) == (0, 4 * P)


def test_an_event_that_raises_does_not_reach_the_tree(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests are stored and hit as before; it is logged once, with where it happened."""
    live, guard = LiveTree(), Guard()
    monkeypatch.setattr(tree_module, "GUARD", guard)
    ask(live, [1, 2, 3, 4] * 3)

    def broken(*_args: object) -> None:
        raise RuntimeError("this event is broken")

    for name in ("stored", "evicted", "ended"):
        monkeypatch.setattr(live.tree.mirror, name, broken)
    for _ in range(3):
        request = live.begin([1, 2, 3, 4] * 3)
        assert request.cached_tokens == 8
        live.finish(request, [1, 1, 1, 1])
    live.evict(100 * P)
    assert live.stored_pages() == set()
    assert guard.errors == 6  # three requests, and three nodes that were given up
    logged = [record for record in caplog.records if "observing failed" in record.message]
    assert [record.message.split("(")[1].split(")")[0] for record in logged] == [
        "a request is stored",
        "a node is evicted",
    ]
    assert all("this event is broken" in str(record.exc_info) for record in logged)


def test_a_flush_begins_anew() -> None:
    both = Both()
    ask(both.live, [1, 2, 3, 4] * 3)
    both.live.tree.reset()
    both.live.allocator.clear()
    assert both.live.tree.mirror.nodes == {}
    both.look()
    both.do("ask", [0, 7, 8, 9] * 3, None, 0)
    both.look()


def test_events_touch_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read from a device waits for it."""
    live = LiveTree()
    request = live.begin([1, 2, 3, 4] * 3)
    path = live.tree._path

    class Nothing:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"an event asks for {name}")

    monkeypatch.setattr(live.tree, "token_to_kv_pool_allocator", Nothing())
    monkeypatch.setattr(live.tree, "req_to_token_pool", Nothing())
    live.tree._stored(request)
    assert path(request.last_node) == ()
