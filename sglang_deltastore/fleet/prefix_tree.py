"""The radix tree of SGLang 0.5.23 without its tensors: which pages are resident, how finely, and who goes first.

What it shares with `sglang.srt.mem_cache.unified_radix_cache` (checked against it in tests/fleet/test_tree.py):
a node is a run of blocks; a match that ends inside a node splits it; a walk makes its whole path most recent; only
unlocked leaves are evicted, the least recently used first, each as a whole; a parent left without children is a leaf.
One oddity is kept: a split makes the part that was *not* used as recent as the split.

A sequence is `bytes`, 8 for each block: the block's id as a little-endian int64. A block stands for
`pages_per_block` pages. Comparing and slicing runs of blocks is then `memcmp` and `memcpy`, which is what makes the
replay fast. The last block of a sequence may be partial: its id is negative and says how many whole pages it has, see
`partial_block`.
"""

from __future__ import annotations

import heapq
import math
import sys
from array import array
from collections.abc import Iterable, Sequence
from operator import mul

from ..policy.precision import SGLANGS, Policy, warmed

ID_BYTES = 8
_SIGN = 0x80


def block_sequence(ids: Iterable[int]) -> bytes:
    """The sequence of those block ids (non-negative, below 2**63)."""
    packed = array("q", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def partial_block(block_id: int, pages: int, pages_per_block: int) -> bytes:
    """The sequence of one block that has only `pages` whole pages, 0 < pages < pages_per_block."""
    return block_sequence([-(block_id * pages_per_block + pages) - 1])


def whole_blocks(sequence: bytes) -> int:
    """Blocks of a sequence without its last one where that is partial."""
    return len(sequence) // ID_BYTES - (sequence[-1:] >= b"\x80")


class Node:
    """A run of blocks; its path from the root has `end_bytes` of sequence and `end_pages` pages.

    `level`: how its pages are encoded; `contexts`: leaves at or below it; `queued`: a heap has an entry; the rest says
    how it is used, see `policy.precision.Use`.
    """

    __slots__ = (
        "children", "contexts", "end_bytes", "end_pages", "heat", "hits", "key", "level", "locks", "pages", "parent",
        "queued", "used_at", "used_turnovers",
    )  # fmt: skip

    def __init__(self, parent: Node | None, key: bytes, pages: int, used_at: int, level: int = 0) -> None:
        self.parent, self.key, self.pages, self.used_at, self.level = parent, key, pages, used_at, level
        self.end_bytes = len(key) + (parent.end_bytes if parent else 0)
        self.end_pages = pages + (parent.end_pages if parent else 0)
        self.children: dict[bytes, Node] = {}
        self.queued = False
        self.locks = self.hits = 0
        self.contexts = 1
        self.used_turnovers = self.heat = 0.0


class Tree:
    """Pages by prefix, each at a level. `pages` are resident, `locked_pages` of them belong to running requests.

    page_sizes: of a page by level, finest first, in any unit; one level: pages are counted. capacity_pages: as many as
    the cache could hold at the last level (None: endless), for the policy's shares and its clock.
    """

    def __init__(
        self,
        pages_per_block: int = 1,
        page_sizes: Sequence[int] = (1,),
        capacity_pages: int | None = None,
        policy: Policy = SGLANGS,
    ) -> None:
        self.pages_per_block, self.page_sizes, self.policy = pages_per_block, page_sizes, policy
        self.floor = len(page_sizes) - 1
        self.capacity = None if capacity_pages is None else capacity_pages * page_sizes[-1]
        self.root = Node(None, b"", 0, 0)
        self.root.locks = 1
        self.pages_at, self._locked_at = [0] * len(page_sizes), [0] * len(page_sizes)
        self.evicted_pages = self.evicted_nodes = self.demoted_pages = self.freed_by_demotion = 0
        self.stored_pages = 0
        self._turnover_pages = math.inf if capacity_pages is None else capacity_pages
        self._operations = 0
        self._heaps: list[list[tuple[float, int, int, Node]]] = [[] for _ in page_sizes]
        self._pushes = 0

    @property
    def pages(self) -> int:
        return sum(self.pages_at)

    @property
    def locked_pages(self) -> int:
        return sum(self._locked_at)

    @property
    def size(self) -> int:
        """Of the resident pages, in the unit of `page_sizes`."""
        return sum(map(mul, self.pages_at, self.page_sizes))

    @property
    def locked_size(self) -> int:
        return sum(map(mul, self._locked_at, self.page_sizes))

    @property
    def sinkable_size(self) -> int:
        """That comes free if all that no request holds sinks to the floor."""
        sizes = zip(self.pages_at, self._locked_at, self.page_sizes, strict=True)
        return sum((pages - locked) * (size - self.page_sizes[-1]) for pages, locked, size in sizes)

    @property
    def turnovers(self) -> float:
        """The clock of `policy.precision`."""
        return self.stored_pages / self._turnover_pages

    def pages_of(self, sequence: bytes) -> int:
        """Whole pages of a sequence."""
        if not sequence:
            return 0
        pages = len(sequence) // ID_BYTES * self.pages_per_block
        if sequence[-1] & _SIGN:
            last = int.from_bytes(sequence[-ID_BYTES:], "little", signed=True)
            pages -= self.pages_per_block - (-last - 1) % self.pages_per_block
        return pages

    def match(self, sequence: bytes, start: Node | None = None) -> Node:
        """The node where the longest resident prefix of `sequence` ends (the root: nothing); makes its path recent.

        start: a locked node known to be on that path; the walk begins there. What is above it keeps its recency, which
        changes nothing: it can only go after what is below, and right after.
        """
        self._operations = now = self._operations + 2
        node = start or self.root
        offset, end = node.end_bytes, len(sequence)
        while offset < end:
            child = node.children.get(sequence[offset : offset + ID_BYTES])
            if child is None:
                break
            key = child.key
            if not sequence.startswith(key, offset):
                child = self._split(child, common_blocks(key, sequence, offset), now - 1)
                child.used_at = now
                return child
            child.used_at = now
            node = child
            offset += len(key)
        return node

    def count_hit(self, node: Node, usable_pages: int) -> list[int]:
        """A request found the path to `node` and uses its first `usable_pages`; returns how many at each level."""
        hit_pages = [0] * len(self.page_sizes)
        turnovers, half_life = self.turnovers, self.policy.half_life_turnovers
        while node.parent is not None:
            hit_pages[node.level] += min(node.end_pages, usable_pages) - node.parent.end_pages
            node.hits += 1
            node.heat = warmed(node.heat, turnovers, half_life)
            node.used_turnovers = turnovers
            node = node.parent
        return hit_pages

    def insert(self, sequence: bytes, start: Node | None = None, level: int = 0) -> Node:
        """Make all of `sequence` resident, what is missing at `level`; returns the node where it ends. `start`: as in
        `match`."""
        node = self.match(sequence, start)
        if node.end_bytes < len(sequence):
            key = sequence[node.end_bytes :]
            child = Node(node, key, self.pages_of(key), self._operations, level)
            child.used_turnovers = child.heat = self.turnovers
            if node.children:
                self._count_context(node, 1)
            node.children[key[:ID_BYTES]] = child
            self.pages_at[level] += child.pages
            self.stored_pages += child.pages
            self._queue(child)
            node = child
        return node

    def lock(self, node: Node, locked: Node | None = None) -> None:
        """Keep the path to `node` as it is; locks count. `locked`: a node on the path that the caller holds; its lock
        becomes part of this one."""
        last = locked or self.root
        while node is not last:
            if node.locks == 0:
                self._locked_at[node.level] += node.pages
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock(node)`."""
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self._locked_at[node.level] -= node.pages
                self._queue(node)
            node = node.parent

    def free(self, size: int) -> int:
        """Demote and evict by the policy until `size` is free or nothing can give any; returns what was freed."""
        freed = 0
        while freed < size and (gained := self._free_some()):
            freed += gained
        return freed

    def rested_turnovers(self, level: int) -> float:
        """Since the last use of the page that would next sink from `level`, or at the floor go; 0: there is none."""
        node = self._coldest(level)
        return self.turnovers - node.used_turnovers if node else 0.0

    def _free_some(self) -> int:
        if self.floor == 0:
            return self._evict()
        held = list(map(mul, self.pages_at, self.page_sizes))
        for level in self.policy.who_pays(held, self.capacity or 0):
            if gained := self._evict() if level == self.floor else self._demote(level):
                return gained
        return 0

    def _evict(self) -> int:
        """The first leaf at the floor, as a whole."""
        node = self._coldest(self.floor)
        if node is None:
            return 0
        heapq.heappop(self._heaps[self.floor])
        parent = node.parent
        del parent.children[node.key[:ID_BYTES]]
        if parent.children:
            self._count_context(parent, -1)
        self.evicted_nodes += 1
        self.evicted_pages += node.pages
        self.pages_at[self.floor] -= node.pages
        self._queue(parent)
        return node.pages * self.page_sizes[-1]

    def _demote(self, level: int) -> int:
        """The first node of a level above the floor, as a whole, by one level."""
        node = self._coldest(level)
        if node is None:
            return 0
        heapq.heappop(self._heaps[level])
        node.queued = False
        node.level = level + 1
        self.pages_at[level] -= node.pages
        self.pages_at[level + 1] += node.pages
        self._queue(node)
        gained = node.pages * (self.page_sizes[level] - self.page_sizes[level + 1])
        self.demoted_pages += node.pages
        self.freed_by_demotion += gained
        return gained

    def _coldest(self, level: int) -> Node | None:
        """The first of a level to sink or go, which its heap then has in front."""
        heap = self._heaps[level]
        while heap:
            rank, _, _, node = heap[0]
            if self._may_sink(node) and rank == self.policy.worth(node):
                return node
            heapq.heappop(heap)
            node.queued = False
            self._queue(node)
        return None

    def _split(self, child: Node, blocks: int, now: int) -> Node:
        """Cut `child` after its first `blocks` blocks; returns the new node of those."""
        cut = blocks * ID_BYTES
        head = Node(child.parent, child.key[:cut], blocks * self.pages_per_block, child.used_at, child.level)
        head.locks, head.hits, head.contexts = child.locks, child.hits, child.contexts
        head.heat, head.used_turnovers = child.heat, child.used_turnovers
        head.parent.children[head.key[:ID_BYTES]] = head
        head.children[child.key[cut : cut + ID_BYTES]] = child
        child.parent, child.key, child.pages = head, child.key[cut:], child.pages - head.pages
        child.used_at = now
        self._queue(head)
        return head

    def _count_context(self, node: Node, change: int) -> None:
        while node.parent is not None:
            node.contexts += change
            node = node.parent

    def _may_sink(self, node: Node) -> bool:
        """Whether no request holds it and, at the floor, whether it is a leaf: above it anything may be demoted."""
        return not node.locks and (node.level < self.floor or not node.children)

    def _queue(self, node: Node) -> None:
        """Each level's heap has one entry for every node that may sink from there, at or before its rank: `_coldest`
        corrects late ones. Of equal ranks the deepest goes first."""
        if not node.queued and self._may_sink(node):
            node.queued = True
            self._pushes += 1
            heapq.heappush(self._heaps[node.level], (self.policy.worth(node), -node.end_pages, self._pushes, node))


def common_blocks(key: bytes, sequence: bytes, offset: int) -> int:
    """Leading blocks of `key` that `sequence` repeats from `offset` on; the first is known to be equal."""
    low, high = 1, min(len(key), len(sequence) - offset) // ID_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if sequence.startswith(key[: middle * ID_BYTES], offset):
            low = middle
        else:
            high = middle - 1
    return low
