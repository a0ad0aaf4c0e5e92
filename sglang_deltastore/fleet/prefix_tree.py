"""The radix tree of SGLang 0.5.23 without its tensors: which pages are resident, and who goes first.

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
import sys
from array import array
from collections.abc import Iterable

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

    `used_at` counts operations of the tree; `queued`: the eviction heap has an entry.
    """

    __slots__ = ("children", "end_bytes", "end_pages", "key", "locks", "pages", "parent", "queued", "used_at")

    def __init__(self, parent: Node | None, key: bytes, pages: int, used_at: int, locks: int = 0) -> None:
        self.parent, self.key, self.pages, self.used_at, self.locks = parent, key, pages, used_at, locks
        self.end_bytes = len(key) + (parent.end_bytes if parent else 0)
        self.end_pages = pages + (parent.end_pages if parent else 0)
        self.children: dict[bytes, Node] = {}
        self.queued = False


class Tree:
    """Pages by prefix. `pages` are resident, `locked_pages` of them belong to running requests."""

    def __init__(self, pages_per_block: int = 1) -> None:
        self.pages_per_block = pages_per_block
        self.root = Node(None, b"", 0, 0, locks=1)
        self.pages = self.locked_pages = self.evicted_pages = self.evicted_nodes = 0
        self._operations = 0
        self._heap: list[tuple[int, int, Node]] = []
        self._pushes = 0

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

    def insert(self, sequence: bytes, start: Node | None = None) -> Node:
        """Make all of `sequence` resident; returns the node where it ends. `start`: as in `match`."""
        node = self.match(sequence, start)
        if node.end_bytes < len(sequence):
            key = sequence[node.end_bytes :]
            child = Node(node, key, self.pages_of(key), self._operations)
            node.children[key[:ID_BYTES]] = child
            self.pages += child.pages
            self._queue_if_evictable(child)
            node = child
        return node

    def lock(self, node: Node, locked: Node | None = None) -> None:
        """Keep the path to `node` from being evicted; locks count. `locked`: a node on the path that the caller holds;
        its lock becomes part of this one."""
        last = locked or self.root
        while node is not last:
            if node.locks == 0:
                self.locked_pages += node.pages
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock(node)`."""
        leaf = node
        while node.parent is not None:
            node.locks -= 1
            if node.locks == 0:
                self.locked_pages -= node.pages
            node = node.parent
        self._queue_if_evictable(leaf)

    def evict(self, pages: int) -> int:
        """Evict least recently used leaves until `pages` are free or nothing is evictable; returns the pages freed."""
        freed = 0
        while freed < pages and self._heap:
            used_at, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.children or node.locks:
                continue
            if used_at != node.used_at:
                self._queue_if_evictable(node)
                continue
            parent = node.parent
            del parent.children[node.key[:ID_BYTES]]
            freed += node.pages
            self.evicted_nodes += 1
            self._queue_if_evictable(parent)
        self.pages -= freed
        self.evicted_pages += freed
        return freed

    def _split(self, child: Node, blocks: int, now: int) -> Node:
        """Cut `child` after its first `blocks` blocks; returns the new node of those."""
        cut = blocks * ID_BYTES
        head = Node(child.parent, child.key[:cut], blocks * self.pages_per_block, child.used_at, child.locks)
        head.parent.children[head.key[:ID_BYTES]] = head
        head.children[child.key[cut : cut + ID_BYTES]] = child
        child.parent, child.key, child.pages = head, child.key[cut:], child.pages - head.pages
        child.used_at = now
        return head

    def _queue_if_evictable(self, node: Node) -> None:
        """The heap has one entry for every evictable leaf, at or before its `used_at`: `evict` corrects late ones."""
        if not node.queued and not node.locks and not node.children:
            node.queued = True
            self._pushes += 1
            heapq.heappush(self._heap, (node.used_at, self._pushes, node))


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
