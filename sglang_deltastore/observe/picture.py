"""One moment of the tree: what is stored by events, together with the requests that run now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .nodes import Mirror, Node
from .stats import NodeStats

NODES_SHOWN, MOST_SHOWN = 64, 256
"""So many of the hottest nodes are shown, together with all nodes above them; of both together at most this many."""

NODES_SWEPT = 512
"""Nodes that are offered to the hottest at each picture."""


@dataclass(frozen=True)
class RunningContext:
    """A running request: its context leaves the tree at the end of this node (0, or one that the mirror does not know:
    it shares nothing with the tree), and goes on with `own_tokens` that no node holds."""

    node_id: int
    own_tokens: int


@dataclass(frozen=True)
class Picture:
    """Totals, and the nodes to show; see stats.StoreStats."""

    contexts: int
    conversations: int
    logical_tokens: int
    conversation_tokens: int
    stored_tokens: int
    nodes: tuple[NodeStats, ...]


@dataclass
class _Leaving:
    """Running contexts that leave the tree at a node or below it.

    leaves: that are no contexts by themselves, since a running one goes on from them; conversations: how many more
    there are by it, where no prompt ends in the path.
    """

    contexts: int = 0
    leaves: int = 0
    conversations: int = 0

    def add(self, other: _Leaving) -> None:
        self.contexts += other.contexts
        self.leaves += other.leaves
        self.conversations += other.conversations


def picture(mirror: Mirror, running: Sequence[RunningContext]) -> Picture:
    """Costs the nodes shown, and the paths of running requests as far up as the first node shown."""
    mirror.hottest.sweep(NODES_SWEPT)
    shown = {node.id: _Leaving() for node in _shown(mirror)}
    root = mirror.root
    shown[root.id] = _Leaving()
    ended = _prompt_ended(mirror, shown)
    own_tokens = sum(context.own_tokens for context in running)
    logical_tokens, conversation_tokens = mirror.logical_tokens + own_tokens, root.conversation_tokens_below
    climbed: dict[int, tuple[int, bool]] = {}
    for node, count in Counter(mirror.nodes.get(context.node_id, root) for context in running).items():
        is_leaf = not node.children and node is not root
        above, in_prompt = _climb(node, ended, climbed)
        more = 0 if in_prompt else count - is_leaf
        shown[above].add(_Leaving(count, is_leaf, more))
        logical_tokens += node.end * (count - is_leaf)
        conversation_tokens += node.end * more
    nodes = _nodes(mirror, shown, ended)
    total = shown[root.id]
    return Picture(
        contexts=root.leaves + total.contexts - total.leaves,
        conversations=root.conversations_below + total.conversations,
        logical_tokens=logical_tokens,
        conversation_tokens=conversation_tokens + own_tokens,
        stored_tokens=mirror.stored_tokens + own_tokens,
        nodes=nodes,
    )


def _shown(mirror: Mirror) -> list[Node]:
    """The hottest, each with all above it, as far as they fit."""
    shown: dict[int, Node] = {}
    for hot in mirror.hottest.best(NODES_SHOWN):
        node = hot
        path: list[Node] = []
        while node.parent is not None and node.id not in shown and len(path) <= MOST_SHOWN:
            path.append(node)
            node = node.parent
        if len(shown) + len(path) <= MOST_SHOWN:
            shown.update((each.id, each) for each in path)
    return list(shown.values())


def _prompt_ended(mirror: Mirror, shown: dict[int, _Leaving]) -> dict[int, bool]:
    """Of each node shown: whether a prompt has ended in it or above it."""
    ended = {mirror.root.id: False}
    for node in sorted((mirror.nodes[each] for each in shown if each in mirror.nodes), key=lambda node: node.start):
        assert node.parent is not None
        ended[node.id] = ended[node.parent.id] or bool(node.prompt_ends)
    return ended


def _climb(node: Node, ended: dict[int, bool], climbed: dict[int, tuple[int, bool]]) -> tuple[int, bool]:
    """The nearest node shown, at `node` or above it, and whether a prompt has ended in the path to `node`."""
    path, here = [], node
    while here.id not in ended and here.id not in climbed:
        path.append(here)
        assert here.parent is not None
        here = here.parent
    above, in_prompt = climbed[here.id] if here.id in climbed else (here.id, ended[here.id])
    for each in reversed(path):
        in_prompt = in_prompt or bool(each.prompt_ends)
        climbed[each.id] = above, in_prompt
    return above, in_prompt


def _nodes(mirror: Mirror, shown: dict[int, _Leaving], ended: dict[int, bool]) -> tuple[NodeStats, ...]:
    """Adds what leaves below to all above, and describes the nodes, the largest first."""
    nodes = sorted((mirror.nodes[each] for each in shown if each in mirror.nodes), key=lambda node: -node.start)
    for node in nodes:
        assert node.parent is not None
        shown[node.parent.id].add(shown[node.id])
    nodes.sort(key=lambda node: -node.subtree_tokens)
    return tuple(_describe(mirror, node, shown[node.id], ended) for node in nodes)


def _describe(mirror: Mirror, node: Node, leaving: _Leaving, ended: dict[int, bool]) -> NodeStats:
    above = node.parent
    assert above is not None
    return NodeStats(
        id=node.id,
        parent=0 if above is mirror.root else above.id,
        start_tokens=node.start,
        tokens=node.tokens,
        contexts=node.leaves + leaving.contexts - leaving.leaves,
        conversations=1 if ended[node.id] else node.conversations + leaving.conversations,
        running=leaving.contexts,
        requests=node.requests,
        hits=node.hits,
        hit_tokens=node.hit_tokens,
        children=node.children,
        subtree_tokens=node.subtree_tokens,
        first_token_ids=tuple((node.token_ids or ())[: mirror.page_tokens]),
    )
