"""Caches whose pages have levels: what must hold whatever comes, and figures worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.fleet.kv import FP16, parse_tier
from sglang_deltastore.fleet.page_pool import Cache, Running
from sglang_deltastore.fleet.prefix_tree import Node, Tree, block_sequence
from sglang_deltastore.fleet.replay import Costs, Replay, replay
from sglang_deltastore.fleet.tables import Model, read_table
from sglang_deltastore.policy.precision import RANKS, Policy
from tests.fleet.test_replay import PAGE, PROMPTS, request
from tests.fleet.test_tree import path_of

SIZES = (7, 5, 4)
POLICIES = st.builds(
    Policy, st.sampled_from(sorted(RANKS.values(), key=str)), st.sampled_from((0.0, 0.25, 0.6)), st.just(0.5)
)
STEPS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=7).map(tuple), st.integers(1, 9),
                           st.integers(0, 3)), max_size=40)  # fmt: skip


def nodes_of(tree: Tree) -> list[Node]:
    found, stack = [], [tree.root]
    while stack:
        node = stack.pop()
        found += node.children.values()
        stack += node.children.values()
    return found


def level_of_pages(nodes: list[Node]) -> dict[tuple[int, ...], int]:
    """Each resident page, as the path to it, and its level."""
    pages = {}
    for node in nodes:
        path = path_of(node)
        pages |= {path[:end]: node.level for end in range(node.parent.end_pages + 1, node.end_pages + 1)}
    return pages


def check(cache: Cache, before: dict[Any, int], held: list[Running]) -> dict[Any, int]:
    tree = cache.tree
    nodes = nodes_of(tree)
    pages = level_of_pages(nodes)
    private = sum(running.private_pages * SIZES[running.level] for running in held)
    assert cache.size == private + sum(SIZES[level] for level in pages.values()) <= tree.capacity
    assert all(pages[page] >= level for page, level in before.items() if page in pages), "a page rose"
    for running in held:
        path = path_of(running.node)
        assert all(pages[path[:end]] == before.get(path[:end], pages[path[:end]]) for end in range(1, len(path) + 1))
    by_level = [sum(level == at for level in pages.values()) for at in range(len(SIZES))]
    assert tree.pages_at == by_level
    locked = [sum(node.pages for node in nodes if node.locks and node.level == at) for at in range(len(SIZES))]
    assert (tree.locked_pages, tree.locked_size) == (
        sum(locked), sum(count * size for count, size in zip(locked, SIZES, strict=True)))  # fmt: skip
    for node in nodes:
        assert node.contexts == sum(not other.children and path_of(other)[: node.end_pages] == path_of(node)
                                    for other in nodes)  # fmt: skip
    return pages


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(4, 30), POLICIES)
def test_what_always_holds(steps: list[tuple[bool, tuple[int, ...], int, int]], pages: int, policy: Policy) -> None:
    """Several requests at once, begun and ended in any order: never more bytes than the budget, levels only sink, what
    running requests hold stays as it is, and all counts are those of a walk through the tree."""
    cache = Cache(pages, PAGE, page_sizes=SIZES, policy=policy)
    held: list[Running] = []
    levels: dict[Any, int] = {}
    for begin, ids, answer, at in steps:
        if begin or not held:
            running = cache.admit(request(*ids, answer=answer))
            held += [running] if running else []
            levels = check(cache, levels, held)
            if running:
                cache.prefilled(running)
        else:
            cache.finish(held.pop(at % len(held)))
        levels = check(cache, levels, held)
    for running in held:
        cache.finish(running)
    assert cache.tree.locked_pages == 0


@settings(max_examples=200, deadline=None)
@given(PROMPTS, POLICIES)
def test_where_all_fits_it_is_the_finest_tier(prompts: list[Any], policy: Policy) -> None:
    requests = [request(*ids, extra=extra, answer=answer) for ids, extra, answer in prompts if ids or extra]
    finest, adaptive = Cache(200, PAGE), Cache(200 * SIZES[0] // SIZES[-1], PAGE, page_sizes=SIZES, policy=policy)
    one, other = replay(requests, [Replay(finest), Replay(adaptive)])
    levels = {"hit_tokens_at": one.hit_tokens_at, "begun_tokens_at": one.begun_tokens_at}
    assert replace(other, capacity_pages=200, **levels) == one
    assert other.hit_tokens_at == (one.hit_tokens, 0, 0) and other.begun_tokens_at[1:] == (0, 0)


@settings(max_examples=200, deadline=None)
@given(PROMPTS, st.integers(3, 14), st.integers(1, 9))
def test_one_level_is_a_fixed_tier_whatever_its_bytes(prompts: list[Any], pages: int, size: int) -> None:
    requests = [request(*ids, extra=extra, answer=answer) for ids, extra, answer in prompts if ids or extra]
    one, other = replay(requests, [Replay(Cache(pages, PAGE)), Replay(Cache(pages, PAGE, page_sizes=(size,)))])
    assert one == other


def test_demotion_before_eviction_by_hand() -> None:
    """Sizes 3 and 2, room for 12. A prompt stores one page and wants three while it is computed: its last token's, and
    one to spare. 3 finds 6 free, and sinking frees no more than 2: it begins at the floor. For 4 two sink, for 5 one
    goes."""
    cache = Cache(6, PAGE, page_sizes=(3, 2))
    assert [serve(cache, each) for each in (1, 2, 3)] == [(0, {1: 0}), (0, {1: 0, 2: 0}), (1, {1: 0, 2: 0, 3: 1})]
    assert serve(cache, 4) == (1, {1: 1, 2: 1, 3: 1, 4: 1})
    assert (cache.size, cache.tree.demoted_pages, cache.tree.evicted_pages) == (8, 2, 0)
    assert serve(cache, 5) == (1, {2: 1, 3: 1, 4: 1, 5: 1})
    assert (cache.tree.demoted_pages, cache.tree.freed_by_demotion, cache.tree.evicted_pages) == (2, 2, 1)


def test_new_pages_begin_fine_while_what_sinks_for_them_has_rested() -> None:
    """Room for 400. After 131 prompts 7 are free, and the next one wants 9; 1 has rested for 130 of 200 pages."""
    cache = Cache(200, PAGE, page_sizes=(3, 2))
    assert {serve(cache, each)[0] for each in range(1, 132)} == {0}
    level, pages = serve(cache, 132)
    assert (level, [page for page, at in pages.items() if at]) == (0, [1, 2])
    for page in range(1, 133):  # all but the last ones sink, for these were just used
        serve(cache, page)
    level, _ = serve(cache, 133)
    assert level == 1


def serve(cache: Cache, *ids: int) -> tuple[int, dict[int, int]]:
    """The level that a prompt of those pages begins at, and then all pages by level."""
    running = cache.admit(request(*ids))
    assert running is not None
    cache.prefilled(running)
    cache.finish(running)
    return running.level, {path[-1]: level for path, level in sorted(level_of_pages(nodes_of(cache.tree)).items())}


def test_hits_are_told_by_level() -> None:
    """Two pages, of which the deeper sank; a request that hits both, and one that hits the first alone."""
    cache = Cache(100, PAGE, page_sizes=(4, 2))
    cache.tree.insert(block_sequence((1,)))
    cache.tree.insert(block_sequence((1, 2)))
    assert cache.tree.free(2) == 2
    (outcome,) = replay([request(1, 2), request(1, 3)], [Replay(cache)])
    assert (outcome.hit_tokens, outcome.hit_tokens_at) == (12, (8, 4))
    assert outcome.worst_hit_share == (4 + 2) / 2 / 4
    assert outcome.begun_tokens_at == (1 + 5, 0)
    assert (outcome.demoted_pages, outcome.spared_pages) == (1, 0.5)
    (outcome,) = replay([request(1), request(2), request(3)], [Replay(Cache(6, PAGE, page_sizes=(3, 2)))])
    assert outcome.begun_tokens_at == (5 + 5, 5), "the third begins at the floor"


def test_the_deepest_of_a_path_sinks_first_and_what_is_held_does_not() -> None:
    tree = Tree(page_sizes=(4, 2), capacity_pages=50)
    first = tree.insert(block_sequence((1,)))
    for ids in ((1, 2), (1, 2, 3), (9,)):
        tree.insert(block_sequence(ids))
    tree.match(block_sequence((1, 2, 3)))
    tree.lock(first)
    sunk = []
    while tree.free(1):
        levels = level_of_pages(nodes_of(tree))
        sunk.append({path for path, level in levels.items() if level})
        if len(levels) < 4:
            break
    assert [sorted(now - before) for before, now in zip([set(), *sunk], sunk, strict=False)][:3] == [
        [(9,)], [(1, 2, 3)], [(1, 2)]]  # fmt: skip
    assert (first.level, first.locks, len(levels)) == (0, 1, 3), "then the oldest leaf at the floor goes"


def test_both_parts_of_a_split_remember_how_they_were_used() -> None:
    tree = Tree(page_sizes=SIZES, capacity_pages=100)
    tree.insert(block_sequence((9, 9)))
    node = tree.insert(block_sequence((1, 2, 3)))
    assert tree.count_hit(node, 2) == [2, 0, 0], "the third page was not used"
    tree.insert(block_sequence((5,)))
    head = tree.match(block_sequence((1, 7)))
    assert head is node.parent and (head.pages, node.pages) == (1, 2)
    for part in (head, node):
        assert (part.hits, part.used_turnovers) == (1, 5 / 100)
        assert part.heat > 0.5, "stored at 2 / 100, hit at 5 / 100: twice as warm as at its last use"


def test_timed_requests_have_levels_too() -> None:
    """Two at once; every second prompt comes again. Pages sink, and hits are those of one level in the same bytes."""
    costs = Costs(100, 100, 50, workers=2)
    requests = [request(number // 4 * 2 + number % 2, answer=6, at=float(number)) for number in range(80)]
    caches = [Cache(12, PAGE, page_sizes=sizes) for sizes in ((2,), (3, 2))]
    fixed, adaptive = replay(requests, [Replay(cache, costs) for cache in caches])
    assert adaptive.hit_tokens == fixed.hit_tokens == 40 * PAGE
    assert adaptive.demoted_pages > 0 and caches[1].tree.locked_pages == 0


def test_levels_are_those_of_the_layout() -> None:
    model = read_table(Model, "models.toml")["Llama-3-8B"]
    adaptive = parse_tier("adaptive-k2v2")
    assert adaptive.page_bytes(model) == tuple(
        parse_tier(name).bytes_per_token(model) * 16 for name in ("lossless", "conservative", "k2v2")
    )
    assert adaptive.bytes_per_token(model) == adaptive.page_bytes(model)[-1] / 16, "plans count on the floor"
    assert adaptive.bits(model)[1] == pytest.approx(16 / parse_tier("conservative").ratio(model))
    assert FP16.bits(model) == (16.0,) and parse_tier("x=4").bits(model) == (4.0,)
