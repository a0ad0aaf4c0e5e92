"""The nodes that are hit most, without ever sorting all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

KEPT = 256
"""So many nodes are kept; few enough to be sorted at every snapshot, and four times as many as are shown, since some of
them are evicted or split before the next sweep."""


class Node(Protocol):
    """What is looked at of a node of the mirror; `kept` is ours."""

    start: int
    end: int
    hits: int
    leaves: int
    kept: bool


N = TypeVar("N", bound=Node)


def heat(node: Node) -> tuple[int, int, int]:
    """Order of heat: tokens that requests found here, tokens that are not stored twice, tokens."""
    tokens = node.end - node.start
    return node.hits * tokens, tokens * (node.leaves - 1), tokens


class Hottest(Generic[N]):
    """A node is offered when something happens to it; `sweep` offers all of them in turn, a few at a time."""

    def __init__(self, order: Sequence[N]) -> None:
        self._order = order
        self._kept: list[N] = []
        self._coldest: tuple[int, ...] = ()
        self._next = 0

    def offer(self, node: N) -> None:
        if node.kept or heat(node) <= self._coldest:
            return
        node.kept = True
        self._kept.append(node)
        if len(self._kept) > 2 * KEPT:
            self._kept.sort(key=heat, reverse=True)
            for dropped in self._kept[KEPT:]:
                dropped.kept = False
            del self._kept[KEPT:]
            self._coldest = heat(self._kept[-1])

    def forget(self, node: N) -> None:
        """The node is gone. Where many of those kept are, colder ones may come in again."""
        if node.kept:
            self._kept.remove(node)
            if len(self._kept) < KEPT // 2:
                self._coldest = ()

    def sweep(self, count: int) -> None:
        """Offer the next `count` nodes."""
        begin = self._next if self._next < len(self._order) else 0
        for node in self._order[begin : begin + count]:
            self.offer(node)
        self._next = begin + count

    def best(self, limit: int) -> list[N]:
        """The hottest first."""
        return sorted(self._kept, key=heat, reverse=True)[:limit]
