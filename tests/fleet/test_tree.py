"""The replay's radix tree against a plain one that scans lists, and against SGLang's own."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.fleet.prefix_tree import Node, Tree, block_sequence, partial_block

Ids = tuple[int, ...]


@dataclass
class PlainNode:
    path: Ids
    start: int
    used_at: int
    locks: int = 0


class PlainTree:
    """The same rules, written for the eye: a list of nodes, each with its whole path; every question is a scan."""

    def __init__(self) -> None:
        self.nodes: list[PlainNode] = []
        self.now = 0

    def match(self, ids: Ids) -> Ids:
        self.now += 2
        found = max((common(node.path, ids) for node in self.nodes), default=0)
        for node in list(self.nodes):
            if node.start < found < len(node.path) and node.path[:found] == ids[:found]:
                self.nodes.append(PlainNode(node.path[:found], node.start, 0, node.locks))
                node.start, node.used_at = found, self.now - 1
        self._touch(ids[:found])
        return ids[:found]

    def insert(self, ids: Ids) -> Ids:
        found = self.match(ids)
        if len(found) < len(ids):
            self.nodes.append(PlainNode(ids, len(found), self.now))
        return ids

    def lock(self, path: Ids, by: int) -> None:
        for node in self.nodes:
            if path[: len(node.path)] == node.path:
                node.locks += by

    def evict(self, count: int) -> int:
        freed = 0
        while freed < count and (leaves := [n for n in self.nodes if not n.locks and self._is_leaf(n)]):
            oldest = min(leaves, key=lambda node: node.used_at)
            self.nodes.remove(oldest)
            freed += len(oldest.path) - oldest.start
        return freed

    def size(self) -> int:
        return sum(len(node.path) - node.start for node in self.nodes)

    def _is_leaf(self, node: PlainNode) -> bool:
        return not any(other.start >= len(node.path) and common(other.path, node.path) == len(node.path)
                       for other in self.nodes)  # fmt: skip

    def _touch(self, path: Ids) -> None:
        for node in self.nodes:
            if path[: len(node.path)] == node.path:
                node.used_at = self.now


class SglangTree:
    """SGLang's UnifiedRadixCache over an allocator that only counts; one token a page."""

    def __init__(self) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self._params = (EvictParams, InsertParams, MatchPrefixParams, RadixKey)
        self.cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=CountingAllocator(),
                page_size=1,
                tree_components=(ComponentType.FULL,),
            )
        )

    def match(self, ids: Ids) -> tuple[int, Any]:
        _, _, match_params, key = self._params
        result = self.cache.match_prefix(match_params(key=key(array("q", ids))))
        return result.device_prefix_len, result.last_device_node

    def insert(self, ids: Ids) -> Any:
        import torch

        _, insert_params, _, key = self._params
        return self.cache.insert(insert_params(key=key(array("q", ids)), value=torch.arange(len(ids)))).last_device_node

    def evict(self, count: int) -> int:
        return self.cache.evict(self._params[0](num_tokens=count)).num_tokens_evicted

    def size(self) -> int:
        return self.cache.total_size()[0]


class CountingAllocator:
    device, page_size = "cpu", 1

    def free(self, *_values: Any, **_options: Any) -> None:
        pass

    free_segment = free


def common(one: Ids, other: Ids) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def path_of(node: Node) -> Ids:
    ids: Ids = ()
    while node.parent is not None:
        ids = (*memoryview(node.key).cast("q"), *ids)
        node = node.parent
    return ids


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("match"), SEQUENCES),
        st.tuples(st.just("insert"), SEQUENCES),
        st.tuples(st.just("hold"), SEQUENCES),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("evict"), st.integers(1, 12)),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(OPERATIONS)
def test_it_is_the_plain_tree(operations: list[tuple[str, Any]]) -> None:
    tree, plain, held = Tree(), PlainTree(), []
    for verb, value in operations:
        if verb == "match":
            assert path_of(tree.match(block_sequence(value))) == plain.match(value)
        elif verb == "insert":
            assert path_of(tree.insert(block_sequence(value))) == plain.insert(value)
        elif verb == "hold":
            node, path = tree.match(block_sequence(value)), plain.match(value)
            tree.lock(node)
            plain.lock(path, by=1)
            held.append((node, path))
        elif verb == "release" and value < len(held):
            node, path = held.pop(value)
            tree.unlock(node)
            plain.lock(path, by=-1)
        elif verb == "evict":
            assert tree.free(value) == plain.evict(value)
        assert tree.pages == plain.size()
        locked = sum(len(node.path) - node.start for node in plain.nodes if node.locks)
        assert tree.locked_pages == locked


@pytest.mark.parametrize("seed", range(12))
def test_it_is_sglangs_tree(seed: int) -> None:
    """400 random operations on each: the same hits, the same evictions, the same size after every one."""
    pick = random.Random(seed)
    tree, real = Tree(), SglangTree()
    held: list[tuple[Node, Any]] = []
    evicted = hits = 0
    for _ in range(400):
        ids = tuple(pick.randrange(3) for _ in range(pick.randint(1, 14)))
        verb = pick.choices(("match", "insert", "hold", "release", "evict"), (3, 4, 2, 2, 1))[0]
        if verb in ("match", "hold"):
            node, (length, real_node) = tree.match(block_sequence(ids)), real.match(ids)
            assert node.end_pages == length
            hits += length
            if verb == "hold":
                tree.lock(node)
                held.append((node, real.cache.lock(real_node)))
        elif verb == "insert":
            tree.insert(block_sequence(ids))
            real.insert(ids)
        elif verb == "release" and held:
            node, lock = held.pop(pick.randrange(len(held)))
            tree.unlock(node)
            real.cache.unlock(lock)
        elif verb == "evict":
            count = pick.randint(1, 10)
            freed = tree.free(count)
            assert freed == real.evict(count)
            evicted += freed
        assert tree.pages == real.size()
    assert evicted > 50, "nothing was evicted: this tested nothing"
    assert hits > 50, "nothing hit: this tested nothing"


def test_what_is_locked_stays_and_goes_when_released() -> None:
    tree = Tree()
    node = tree.insert(block_sequence((1, 2)))
    tree.lock(node)
    assert tree.free(9) == 0
    tree.insert(block_sequence((1, 5)))  # splits the locked node; the lock covers both parts
    assert (tree.free(9), tree.pages, tree.locked_pages) == (1, 2, 2)
    tree.unlock(node)
    assert (tree.free(1), tree.free(1), tree.pages) == (1, 1, 0)


def test_a_use_puts_a_leaf_behind_the_others() -> None:
    tree = Tree()
    for ids in ((1,), (2, 2), (3, 3, 3)):
        tree.insert(block_sequence(ids))
    tree.match(block_sequence((1,)))
    assert [tree.free(1) for _ in range(4)] == [2, 3, 1, 0]


def test_a_split_makes_the_unused_part_recent() -> None:
    """As SGLang does: 1 2 3 4 is older than 7 8 9, but its second half was split off after."""
    tree = Tree()
    tree.insert(block_sequence((1, 2, 3, 4)))
    tree.insert(block_sequence((7, 8, 9)))
    tree.match(block_sequence((1, 2)))
    assert [tree.free(1) for _ in range(3)] == [3, 2, 2]


def test_a_walk_may_begin_at_a_locked_node() -> None:
    tree = Tree()
    node = tree.insert(block_sequence((1, 2)))
    tree.lock(node)
    tree.insert(block_sequence((1, 5)))  # splits the locked node: what is held still ends after 1, 2
    longer = tree.insert(block_sequence((1, 2, 3)), node)
    tree.lock(longer, node)
    assert (path_of(longer), tree.pages, tree.locked_pages) == ((1, 2, 3), 4, 3)
    tree.unlock(longer)
    assert tree.locked_pages == 0


def test_a_partial_block_is_another_block_with_fewer_pages() -> None:
    tree = Tree(pages_per_block=4)
    short = block_sequence((7,)) + partial_block(8, 3, 4)
    assert tree.pages_of(short) == 4 + 3
    assert tree.insert(short).end_pages == 7
    assert tree.match(block_sequence((7, 8))).end_pages == 4
    assert tree.match(short).end_pages == 7
    assert tree.free(1) == 3
    assert tree.pages == 4
