"""What a workload stores and shares, counted from token ids alone: no server is asked."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_deltastore.fleet.page_pool import Sharing, sharing_in
from sglang_deltastore.fleet.prefix_tree import Tree, block_sequence

from .workloads import Prompt


class TokenTree:
    """A radix tree of whole pages of token ids, without end: nothing is evicted."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.asked_pages = 0
        self._tree = Tree()
        self._ids: dict[tuple[int, ...], int] = {}

    def add(self, tokens: Prompt) -> None:
        """Store what a request has in its context; an unfinished page is not stored."""
        ids = self._page_ids(tokens)
        self.asked_pages += len(ids)
        self._tree.insert(block_sequence(ids))

    @property
    def pages(self) -> int:
        """Distinct pages: what a tree that shares prefixes holds."""
        return self._tree.pages

    @property
    def leaf_paths_pages(self) -> int:
        """Pages of all contexts that nobody continues, each by itself."""
        return round(self.pages * self.sharing().across)

    def sharing(self) -> Sharing:
        """temporal: what turns and repeats share with the context they end up in; across: what those contexts share."""
        return sharing_in(self._tree, self.asked_pages)

    def _page_ids(self, tokens: Prompt) -> list[int]:
        """A number for each whole page, equal for equal tokens."""
        starts = range(0, len(tokens) // self.page_tokens * self.page_tokens, self.page_tokens)
        pages = (tuple(tokens[start : start + self.page_tokens]) for start in starts)
        return [self._ids.setdefault(page, len(self._ids)) for page in pages]


def tree_of(contexts: Iterable[Prompt], page_tokens: int) -> TokenTree:
    tree = TokenTree(page_tokens)
    for context in contexts:
        tree.add(context)
    return tree
