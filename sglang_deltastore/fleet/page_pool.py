"""A pool of pages with the radix tree in it, and what a request does to them.

The order of events is that of SGLang 0.5.23 (tests/e2e/test_replay_matches_server.py compares it with a server's):
match, lock, evict for the prompt's pages and one to spare (`alloc_paged_token_slots_extend`), prefill chunk by chunk
and insert each, evict for the answer, insert the answer as a node of its own where the trace knows its blocks, unlock.
"""

from __future__ import annotations

from dataclasses import dataclass

from .formats import Request
from .prefix_tree import ID_BYTES, Node, Tree, whole_blocks

DEFAULT_CHUNK_TOKENS = 8192
"""SGLang 0.5.23's --chunked-prefill-size on A100, H100 and H200 (`arg_groups/memory_hook.py`)."""


class Running:
    """A request that holds pages: `node` is locked, `private_pages` are its own; in the end it has `final_pages`."""

    __slots__ = ("final_pages", "hit_pages", "node", "private_pages", "prompt_pages", "request")

    def __init__(self, request: Request, node: Node, hit_pages: int, prompt_pages: int, final_pages: int) -> None:
        self.request, self.node, self.hit_pages = request, node, hit_pages
        self.prompt_pages, self.final_pages = prompt_pages, final_pages
        self.private_pages = prompt_pages - hit_pages


class Cache:
    """A pool of pages (None: endless) and the tree in it."""

    def __init__(
        self,
        capacity_pages: int | None,
        page_tokens: int,
        pages_per_block: int = 1,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        if capacity_pages is not None and capacity_pages < 1:
            raise ValueError(f"capacity_pages={capacity_pages}: a cache holds at least one page; give a larger budget")
        if chunk_tokens < page_tokens:
            raise ValueError(f"chunk_tokens={chunk_tokens}: at least one page of {page_tokens} tokens is wanted")
        self.capacity_pages, self.page_tokens = capacity_pages, page_tokens
        self.tree = Tree(pages_per_block)
        self._chunk_bytes = max(1, chunk_tokens // (page_tokens * pages_per_block)) * ID_BYTES
        self._private_pages = 0
        self.peak_pages = 0

    def admit(self, request: Request) -> Running | None:
        """Lock what is resident and take pages for the rest of the prompt; None when they cannot be had now."""
        tree, page_tokens, key = self.tree, self.page_tokens, request.blocks
        prompt_tokens, stored_answer = request.prompt_tokens, max(request.answer_tokens - 1, 0)
        # SGLang matches all but the last token, so that there is something to compute.
        usable_pages = (prompt_tokens - 1) // page_tokens
        if tree.pages_per_block == 1:
            key = key[: usable_pages * ID_BYTES]
        node = tree.match(key)
        hit_pages = min(node.end_pages, usable_pages)
        tree.lock(node)
        prompt_pages = -(-prompt_tokens // page_tokens)
        final_pages = -(-(prompt_tokens + stored_answer) // page_tokens)
        if self.capacity_pages is not None:
            if final_pages - hit_pages + 1 > self.capacity_pages - self._private_pages - tree.locked_pages:
                tree.unlock(node)
                return None
            self._make_room(prompt_pages - hit_pages + 1)
        self._private_pages += prompt_pages - hit_pages
        return Running(request, node, hit_pages, prompt_pages, final_pages)

    def prefilled(self, running: Running) -> None:
        """The prompt is computed: insert its whole pages, chunk by chunk; make room for the answer."""
        request, blocks = running.request, running.request.blocks
        self._note_peak()
        self._private_pages -= running.private_pages
        end, last = running.node.end_bytes + self._chunk_bytes, len(blocks)
        while end < last:
            self._insert(running, blocks[:end])
            end += self._chunk_bytes
        self._insert(running, blocks)
        if request.answer_tokens > 1:
            # Each decode step wants one free page, whether or not it takes it.
            before_last_step = -(-(request.prompt_tokens + request.answer_tokens - 2) // self.page_tokens)
            self._make_room(before_last_step - running.node.end_pages + 1)
        running.private_pages = running.final_pages - running.node.end_pages
        self._private_pages += running.private_pages

    def finish(self, running: Running) -> None:
        """The answer is complete: insert what is known of it, let go of the rest."""
        self._note_peak()
        self._private_pages -= running.private_pages
        if running.request.stored is not None:
            self._insert(running, running.request.stored)
        self.tree.unlock(running.node)

    def _make_room(self, pages: int) -> None:
        if self.capacity_pages is not None:
            free = self.capacity_pages - self.tree.pages - self._private_pages
            if free < pages:
                self.tree.evict(pages - free)

    def _insert(self, running: Running, sequence: bytes) -> None:
        """Make `sequence`, which goes on where the request's locked path ends, resident and locked."""
        node = self.tree.insert(sequence, running.node)
        self.tree.lock(node, running.node)
        running.node = node

    def _note_peak(self) -> None:
        pages = self.tree.pages + self._private_pages
        if pages > self.peak_pages:  # noqa: PLR1730  (max() takes twice as long, and this runs for every request)
            self.peak_pages = pages


@dataclass(frozen=True)
class Sharing:
    """How often whole blocks of prompts repeat, over an endless cache; `factor` = `temporal` * `across`.

    temporal  prompts over the paths to the tree's leaves: a turn that continues another repeats all of it
    across    those paths over the tree: what different conversations, or branches of one, have in common
    """

    factor: float
    temporal: float
    across: float


def sharing_in(tree: Tree, whole_block_references: int) -> Sharing:
    """Read the factors off a tree from which nothing was evicted. Partial last blocks are left out: the next turn
    continues them under another id."""
    stored = on_paths = 0
    stack = [tree.root]
    while stack:
        node = stack.pop()
        continued = [child for child in node.children.values() if whole_blocks(child.key)]
        stack += continued
        own = whole_blocks(node.key)
        stored += own
        if not continued:
            on_paths += (node.end_bytes - len(node.key)) // ID_BYTES + own
    if not stored:
        return Sharing(1.0, 1.0, 1.0)
    return Sharing(whole_block_references / stored, whole_block_references / on_paths, on_paths / stored)
