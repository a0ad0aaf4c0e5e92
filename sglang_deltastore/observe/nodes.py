"""A mirror of the radix tree on the host: its nodes by SGLang's own ids, and sums over their subtrees.

It is fed with paths, root to leaf, each step a node's id, its parent's, and the tokens from `path_start` to `path_end`
that it holds. No event touches a device, and each costs the nodes of one path.

Of the tree it is taken that
- a node's id and its end never change; children of a node differ in their first page;
- a split, of which nobody tells, gives the front half a new id, and leaves the old one to the rest;
- whatever else is stored or given up is told.
The mirror therefore joins halves that it has not heard of, which changes no sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from .hottest import Hottest

MOST_UNNAMED = 16
"""Children without a known first page that are asked about, one by one, when a node appears beside them."""


class PathStep(Protocol):
    """A node on its path from the root; see SGLang's TreePathNodeInfo."""

    node_id: int
    parent_id: int
    path_start: int
    path_end: int


class LostTrack(RuntimeError):
    """An event does not fit what the mirror knows."""


class Node:
    """A node of SGLang's tree. Sums are over the node and all below it, of what is stored: running requests are not in
    them. `conversations` and `conversation_tokens` take no notice of prompts that end above the node."""

    __slots__ = (
        "children", "conversation_tokens", "conversation_tokens_below", "conversations", "conversations_below", "end",
        "hits", "id", "kept", "key", "leaves", "parent", "place", "prompt_ends", "requests", "start", "subtree_tokens",
        "token_ids", "unnamed",
    )  # fmt: skip

    def __init__(self, node_id: int, parent: Node | None, start: int, end: int) -> None:
        self.id, self.parent, self.start, self.end = node_id, parent, start, end
        self.children, self.leaves = 0, 1
        self.requests = self.hits = 0
        self.subtree_tokens = self.conversation_tokens = end - start
        self.conversations = 1
        self.conversations_below = self.conversation_tokens_below = 0
        #: where the pages begin in which a prompt has ended
        self.prompt_ends: tuple[int, ...] = ()
        #: names the node among its parent's children; None: its first page is not known
        self.key: int | None = None
        #: children without a key
        self.unnamed: list[Node] | None = None
        self.token_ids: Sequence[int] | None = None
        #: row in Mirror.order; whether `Hottest` keeps the node
        self.place, self.kept = -1, False

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def hit_tokens(self) -> int:
        return self.hits * (self.end - self.start)


class Mirror:
    """The tree as events tell of it. `path_of` asks the tree for the path to a node by its id. With keep_tokens nodes
    keep their token ids; next_tokens: of what follows a page, how many tokens tell it from others as well. After a
    LostTrack, `clear` and go on: paths that come by bring their nodes back."""

    def __init__(
        self,
        page_tokens: int,
        path_of: Callable[[int], Sequence[PathStep]],
        keep_tokens: bool = False,
        next_tokens: int = 0,
    ) -> None:
        self.page_tokens, self._path_of, self._keep_tokens = page_tokens, path_of, keep_tokens
        self._key_tokens = page_tokens + next_tokens
        self.clear()

    def clear(self) -> None:
        """Nothing is stored, or nothing is known any more."""
        self.nodes: dict[int, Node] = {}
        #: the same in any order, each at its `place`
        self.order: list[Node] = []
        self.hottest = Hottest(self.order)
        self.root = Node(0, None, 0, 0)
        self.root.leaves = 0
        #: tokens of all leaves' contexts, each by itself; tokens of nodes that two ended requests or more have used
        self.logical_tokens = self.shared_tokens = 0
        self._by_key: dict[tuple[int, int], Node] = {}

    @property
    def stored_tokens(self) -> int:
        return self.root.subtree_tokens

    # ---- events ----
    def stored(
        self, path: Sequence[PathStep], token_ids: Sequence[int] | None = None, namespace: Hashable = None
    ) -> Node:
        """These nodes are in the tree. token_ids: of the path or longer, where they are known; namespace: what else
        tells equal tokens apart. Returns the last node, or the root of an empty path."""
        above = self.root
        if path:
            above.id = path[0].parent_id
        for at, step in enumerate(path):
            node = self.nodes.get(step.node_id)
            if node is None:
                node = self._appeared(path, at, above, token_ids, namespace)
            if node.parent is not above or node.start != step.path_start or node.end != step.path_end:
                raise LostTrack(f"node {node.id} was at {node.start}..{node.end} and is at {step}")
            if token_ids is not None:
                if node.key is None:
                    self._name(node, self._key(token_ids, node.start, namespace))
                if self._keep_tokens and node.token_ids is None:
                    node.token_ids = token_ids[node.start : node.end]
            above = node
        return above

    def ended(self, last: Node, hit_tokens: int, prompt_tokens: int) -> None:
        """A request has ended: its stored context reaches to the end of `last`, and it had found the first `hit_tokens`
        of its prompt stored."""
        prompt_end = (prompt_tokens - 1) // self.page_tokens * self.page_tokens
        node = last
        while node.parent is not None:
            node.requests += 1
            if node.requests == 2:
                self.shared_tokens += node.tokens
            node.hits += node.end <= hit_tokens
            if node.start <= prompt_end < node.end and prompt_end not in node.prompt_ends:
                node.prompt_ends = (*node.prompt_ends, prompt_end)
                _add_up(node)
            self.hottest.offer(node)
            node = node.parent

    def evicted(self, path: Sequence[PathStep]) -> None:
        """The last node of the path is in the tree no more."""
        node = self.stored(path)
        above = node.parent
        if above is None or node.children:
            raise LostTrack(f"node {node.id} was evicted with {node.children} children below")
        self._forget(node)
        above.children -= 1
        bares_leaf = not above.children and above.parent is not None
        self.logical_tokens -= node.end - (above.end if bares_leaf else 0)
        if node.requests >= 2:
            self.shared_tokens -= node.tokens
        _add_up(above, bares_leaf - 1, -node.tokens, -node.conversations, -node.conversation_tokens)

    # ---- nodes that appear ----
    def _appeared(
        self, path: Sequence[PathStep], at: int, above: Node, token_ids: Sequence[int] | None, namespace: Hashable
    ) -> Node:
        step = path[at]
        key = None if token_ids is None else self._key(token_ids, step.path_start, namespace)
        if whole := self._split_by(path, at, above, key):
            return self._split(whole, step)
        return self._add(above, step, key)

    def _split_by(self, path: Sequence[PathStep], at: int, above: Node, key: int | None) -> Node | None:
        """The node whose front half the new one at `at` is; None: it is new altogether."""
        for later in path[at + 1 :]:
            if (node := self.nodes.get(later.node_id)) is not None:
                return node
        named = self._by_key.get((above.id, key)) if key is not None else None
        asked = [named] if named else (above.unnamed or [])[:MOST_UNNAMED]
        for node in asked:
            if any(step.node_id == path[at].node_id for step in self._path_of(node.id)):
                return node
        return None

    def _split(self, whole: Node, step: PathStep) -> Node:
        """`whole` keeps its rest, a new node takes its front: no sum above them changes."""
        fits = whole.start == step.path_start and whole.start < step.path_end < whole.end
        if not fits or whole.parent is None or whole.parent.id != step.parent_id:
            raise LostTrack(f"{step} is no front half of node {whole.id} at {whole.start}..{whole.end}")
        front = Node(step.node_id, whole.parent, whole.start, step.path_end)
        front.requests, front.hits, front.leaves, front.children = whole.requests, whole.hits, whole.leaves, 1
        front.subtree_tokens = whole.subtree_tokens
        front.prompt_ends = tuple(end for end in whole.prompt_ends if end < front.end)
        self._replace(whole, front)
        whole.parent, whole.start = front, front.end
        front.unnamed = [whole]
        whole.prompt_ends = tuple(end for end in whole.prompt_ends if end >= whole.start)
        whole.subtree_tokens -= front.tokens
        _settle(whole)
        front.conversations_below, front.conversation_tokens_below = whole.conversations, whole.conversation_tokens
        _settle(front)
        if whole.token_ids is not None:
            front.token_ids, whole.token_ids = whole.token_ids[: front.tokens], whole.token_ids[front.tokens :]
        self._remember(front)
        return front

    def _replace(self, whole: Node, front: Node) -> None:
        """The front half begins as the whole did: it takes its name among their parent's children."""
        front.key, whole.key = whole.key, None
        assert front.parent is not None
        if front.key is not None:
            self._by_key[front.parent.id, front.key] = front
        elif front.parent.unnamed:
            front.parent.unnamed = [front if node is whole else node for node in front.parent.unnamed]

    def _add(self, above: Node, step: PathStep, key: int | None) -> Node:
        """A new leaf."""
        node = Node(step.node_id, above, step.path_start, step.path_end)
        if node.start != above.end or node.end <= node.start:
            raise LostTrack(f"{step} does not go on from node {above.id}, which ends at {above.end}")
        if key is not None and (other := self._by_key.get((above.id, key))):
            raise LostTrack(f"{step} begins as node {other.id} beside it does")
        if key is None:
            above.unnamed = [*(above.unnamed or ()), node]
        else:
            node.key = key
            self._by_key[above.id, key] = node
        was_leaf = not above.children and above.parent is not None
        above.children += 1
        self.logical_tokens += node.end - (above.end if was_leaf else 0)
        _add_up(above, 1 - was_leaf, node.tokens, node.conversations, node.conversation_tokens)
        self._remember(node)
        return node

    # ---- records ----
    def _key(self, token_ids: Sequence[int], start: int, namespace: Hashable) -> int:
        return hash((namespace, tuple(token_ids[start : start + self._key_tokens])))

    def _name(self, node: Node, key: int) -> None:
        above: Any = node.parent
        node.key = key
        self._by_key[above.id, key] = node
        above.unnamed = [other for other in above.unnamed or () if other is not node] or None

    def _remember(self, node: Node) -> None:
        self.nodes[node.id] = node
        node.place = len(self.order)
        self.order.append(node)
        self.hottest.offer(node)

    def _forget(self, node: Node) -> None:
        above: Any = node.parent
        del self.nodes[node.id]
        last = self.order.pop()
        if last is not node:
            self.order[node.place], last.place = last, node.place
        self.hottest.forget(node)
        if node.key is not None:
            del self._by_key[above.id, node.key]
        else:
            above.unnamed = [other for other in above.unnamed or () if other is not node] or None


def _settle(node: Node) -> None:
    """A node's conversations from those below it."""
    if node.prompt_ends:
        node.conversations, node.conversation_tokens = 1, node.subtree_tokens
    elif node.children:
        node.conversations = node.conversations_below
        node.conversation_tokens = (node.end - node.start) * node.conversations + node.conversation_tokens_below
    else:
        node.conversations, node.conversation_tokens = 1, node.subtree_tokens


def _add_up(
    node: Node | None, leaves: int = 0, tokens: int = 0, conversations: int = 0, conversation_tokens: int = 0
) -> None:
    """Add what has changed below a node to it and to all above it."""
    while node is not None:
        before, tokens_before = node.conversations, node.conversation_tokens
        node.leaves += leaves
        node.subtree_tokens += tokens
        node.conversations_below += conversations
        node.conversation_tokens_below += conversation_tokens
        _settle(node)
        conversations, conversation_tokens = node.conversations - before, node.conversation_tokens - tokens_before
        if not (leaves or tokens or conversations or conversation_tokens):
            return
        node = node.parent
