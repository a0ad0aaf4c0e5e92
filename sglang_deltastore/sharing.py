"""What contexts share: the records kept for each page, and the tree seen as nodes, contexts and conversations.

page record   requests, hits, prompt ends (and, if asked for, token ids) since the page was written
shape         the tree cut into nodes: pages one after the other with the same contexts below
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .stats import NodeStats


class PageRecords:
    """What has happened to each page since it was written. Slots: SGLang's, whole pages of one context, in order."""

    def __init__(self, num_pages: int, page_tokens: int, keep_tokens: bool = False) -> None:
        self._page_tokens = page_tokens
        self._requests = torch.zeros(num_pages + 1, dtype=torch.int32)
        self._hits = torch.zeros(num_pages + 1, dtype=torch.int32)
        self._ends_prompt = torch.zeros(num_pages + 1, dtype=torch.bool)
        self._begun: list[torch.Tensor] = []
        # Untouched memory costs nothing.
        self.token_ids = torch.empty(num_pages + 1, page_tokens, dtype=torch.int32) if keep_tokens else None

    def begun(self, page_ids: torch.Tensor) -> None:
        """A new life of these pages begins. They may be on a GPU: nobody waits for them before somebody asks."""
        if len(page_ids):
            self._begun.append(page_ids)

    @property
    def requests(self) -> torch.Tensor:
        """[pages + 1] int32: requests that have ended with the page in their context."""
        return self._settled(self._requests)

    @property
    def hits(self) -> torch.Tensor:
        """[pages + 1] int32: those of them that had found it stored."""
        return self._settled(self._hits)

    @property
    def ends_prompt(self) -> torch.Tensor:
        """[pages + 1] bool: whether a prompt has ended in the page."""
        return self._settled(self._ends_prompt)

    def _settled(self, record: torch.Tensor) -> torch.Tensor:
        for page_ids in self._begun:
            pages = page_ids.cpu()
            for one in (self._requests, self._hits, self._ends_prompt):
                one[pages] = 0
        self._begun.clear()
        return record

    def stored(self, slots: torch.Tensor, token_ids: Sequence[int]) -> None:
        """The pages at these slots hold these tokens, and are in nodes now."""
        if self.token_ids is not None:
            self.token_ids[self._pages(slots)] = torch.tensor(token_ids, dtype=torch.int32).view(-1, self._page_tokens)

    def ended(self, slots: torch.Tensor, hit_tokens: int, prompt_tokens: int) -> None:
        """A request has ended with these slots in its context; the first `hit_tokens` it had found stored."""
        pages = self._pages(slots)
        self.requests[pages] += 1
        self.hits[pages[: hit_tokens // self._page_tokens]] += 1
        last_of_prompt = (prompt_tokens - 1) // self._page_tokens
        if last_of_prompt < len(pages):  # else the prompt's last page is not stored whole
            self.ends_prompt[pages[last_of_prompt]] = True

    def shared_tokens(self, page_ids: torch.Tensor) -> int:
        """Tokens of those pages that two requests or more have used."""
        return int((self.requests[page_ids] >= 2).sum()) * self._page_tokens

    @property
    def nbytes(self) -> int:
        kept = (self._requests, self._hits, self._ends_prompt, self.token_ids)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def _pages(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[:: self._page_tokens].cpu().long() // self._page_tokens


@dataclass(frozen=True)
class TreePages:
    """The pages of the tree's nodes, in any order: ids [N], parents [N] (the page before; 0: none), start_tokens [N]
    (tokens before the page in its contexts); int64."""

    ids: np.ndarray
    parents: np.ndarray
    start_tokens: np.ndarray

    @classmethod
    def of_slots(cls, slots: np.ndarray, positions: np.ndarray, before: np.ndarray, page_tokens: int) -> TreePages:
        """From rows of (slot, position, slot of the token before or -1), in any order."""
        first = positions % page_tokens == 0
        before = before[first]
        return cls(slots[first] // page_tokens, np.where(before < 0, 0, before // page_tokens), positions[first])


@dataclass(frozen=True)
class RunningContext:
    """A running request's context: it leaves the tree after `last_page` (0: it shares nothing with it), and goes on
    with `own_tokens` that no node holds."""

    last_page: int
    own_tokens: int

    @classmethod
    def of_slots(cls, slots: torch.Tensor, in_nodes: torch.Tensor, page_tokens: int) -> RunningContext:
        """slots [T]: of the whole context; in_nodes [pages + 1] bool."""
        pages = slots[::page_tokens].cpu().long() // page_tokens
        shared = int(in_nodes[pages].sum())  # a request leaves the tree once: these are its first pages
        return cls(int(pages[shared - 1]) if shared else 0, len(slots) - shared * page_tokens)


class Shape:
    """The tree cut into nodes, and the tokens that contexts and conversations share.

    Arrays by node: `heads` (row of its first page), `parent` (node, or -1), `tokens`, `contexts`, `conversations`,
    `running`, `children`, `subtree_tokens`, `hit_tokens`.
    """

    def __init__(
        self, pages: TreePages, running: Sequence[RunningContext], records: PageRecords, page_tokens: int
    ) -> None:
        self.pages, self.records = pages, records
        row_of_page = np.full(len(records.requests), -1)
        row_of_page[pages.ids] = np.arange(len(pages.ids))
        before = row_of_page[pages.parents]
        leaving = _count(row_of_page[[context.last_page for context in running if context.last_page]], len(pages.ids))
        node_of_row, self.heads, lasts = _cut(
            before, leaving, ended=records.ends_prompt.numpy()[pages.ids], count=len(pages.ids)
        )
        self.parent = np.where(before[self.heads] < 0, -1, node_of_row[before[self.heads]])
        self.tokens = _count(node_of_row, len(self.heads)) * page_tokens
        self.children = _count(self.parent[self.parent >= 0], len(self.heads))
        hits = records.hits.numpy()[pages.ids]
        self.hit_tokens = np.bincount(node_of_row, hits, len(self.heads)).astype(np.int64) * page_tokens
        self._add_up(leaving[lasts], records.ends_prompt.numpy()[pages.ids[lasts]])

        own_tokens = sum(context.own_tokens for context in running)
        alone = sum(not context.last_page for context in running)
        roots = self.parent < 0
        self.num_contexts = int(self.contexts[roots].sum()) + alone
        self.num_conversations = int(self.conversations[roots].sum()) + alone
        self.logical_tokens = int(self.tokens @ self.contexts) + own_tokens
        self.conversation_tokens = int(self.tokens @ self.conversations) + own_tokens
        self.stored_tokens = int(self.tokens.sum()) + own_tokens

    def _add_up(self, leaving: np.ndarray, ends_prompt: np.ndarray) -> None:
        """Sums over subtrees. leaving, ends_prompt [nodes]: running requests that leave the tree after the node;
        whether a prompt ends with it."""
        # Plain lists: a node at a time, children before parents.
        downwards = np.argsort(self.pages.start_tokens[self.heads], kind="stable").tolist()
        parent, ends = self.parent.tolist(), ends_prompt.tolist()
        running = leaving.tolist()
        contexts = np.where((self.children == 0) & (leaving == 0), 1, leaving).tolist()
        conversations, subtree_tokens = list(contexts), self.tokens.tolist()
        for node in reversed(downwards):
            if ends[node]:
                conversations[node] = 1
            if (above := parent[node]) >= 0:
                for sums in (running, contexts, conversations, subtree_tokens):
                    sums[above] += sums[node]
        for node in downwards:  # what follows a prompt's end is of that prompt's conversation
            if parent[node] >= 0 and ends[parent[node]]:
                ends[node], conversations[node] = True, 1
        self.running, self.contexts, self.conversations, self.subtree_tokens = (
            np.array(sums, dtype=np.int64) for sums in (running, contexts, conversations, subtree_tokens)
        )

    def hottest(self, limit: int) -> tuple[NodeStats, ...]:
        """The `limit` nodes with the most hit tokens (then: the most tokens not stored twice), and all above them."""
        if not len(self.heads):
            return ()
        saved = self.tokens * (self.contexts - 1)
        chosen = set()
        for node in np.lexsort((-self.tokens, -saved, -self.hit_tokens))[:limit].tolist():
            above = node
            while above >= 0 and above not in chosen:
                chosen.add(above)
                above = int(self.parent[above])
        return tuple(self._node(node) for node in sorted(chosen, key=lambda node: -self.subtree_tokens[node]))

    def _node(self, node: int) -> NodeStats:
        head, parent = self.heads[node], self.parent[node]
        page, records = int(self.pages.ids[head]), self.records
        return NodeStats(
            id=page,
            parent=int(self.pages.ids[self.heads[parent]]) if parent >= 0 else 0,
            start_tokens=int(self.pages.start_tokens[head]),
            tokens=int(self.tokens[node]),
            contexts=int(self.contexts[node]),
            conversations=int(self.conversations[node]),
            running=int(self.running[node]),
            requests=int(records.requests[page]),
            hits=int(records.hits[page]),
            hit_tokens=int(self.hit_tokens[node]),
            children=int(self.children[node]),
            subtree_tokens=int(self.subtree_tokens[node]),
            first_token_ids=tuple(records.token_ids[page].tolist()) if records.token_ids is not None else (),
        )


def _cut(
    before: np.ndarray, leaving: np.ndarray, ended: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the tree into nodes. before [N]: row of the page before, or -1; leaving [N]: running contexts that go on from
    the page outside the tree; ended [N]: a prompt ends here. Returns each row's node [N], and each node's first and
    last row."""
    children = _count(before[before >= 0], count)
    last = (children != 1) | (leaving > 0) | ended
    first = (before < 0) | last[before]
    # Each row points to the row before, a first row to itself; every round doubles how far.
    head = np.where(first, np.arange(count), before)
    while not np.array_equal(further := head[head], head):
        head = further
    heads, node_of_row = np.unique(head, return_inverse=True)
    lasts = np.empty_like(heads)
    lasts[node_of_row[last]] = np.flatnonzero(last)
    return node_of_row, heads, lasts


def _count(values: np.ndarray, length: int) -> np.ndarray:
    """How often each of 0 .. length - 1 is among `values`."""
    return np.bincount(values.astype(np.int64), minlength=length)
