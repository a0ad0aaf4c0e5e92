"""A pool of pages with the radix tree in it, and what a request does to them.

The order of events is that of SGLang 0.5.23 (tests/e2e/test_replay_matches_server.py compares it with a server's):
match, lock, evict for the prompt's pages and one to spare (`alloc_paged_token_slots_extend`), prefill chunk by chunk
and insert each, evict for the answer, insert the answer as a node of its own where the trace knows its blocks, unlock.
Where pages have levels (`policy.precision`), room is made by demoting, too. Bytes are counted as if pages of one size
could take the place of pages of another: slabs of rows that move between sizes leave a part of one slab each unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..policy.precision import SGLANGS, Policy, first_level
from .formats import Request
from .prefix_tree import ID_BYTES, Node, Tree, whole_blocks

DEFAULT_CHUNK_TOKENS = 8192
"""SGLang 0.5.23's --chunked-prefill-size on A100, H100 and H200 (`arg_groups/memory_hook.py`)."""


class Running:
    """A request that holds pages: `node` is locked, `private_pages` are its own, at `level`; in the end it has
    `final_pages`. hit_pages_at: what it found, by level."""

    __slots__ = (
        "final_pages", "hit_pages", "hit_pages_at", "level", "node", "private_pages", "prompt_pages", "request"
    )  # fmt: skip

    def __init__(
        self, request: Request, node: Node, hit_pages_at: list[int], level: int, prompt_pages: int, final_pages: int
    ) -> None:
        self.request, self.node, self.hit_pages_at, self.level = request, node, hit_pages_at, level
        self.hit_pages = sum(hit_pages_at)
        self.prompt_pages, self.final_pages = prompt_pages, final_pages
        self.private_pages = prompt_pages - self.hit_pages


class Cache:
    """A pool of pages and the tree in it. capacity_pages: as many as it holds at the last level (None: endless).
    page_sizes, policy: as in `Tree`."""

    def __init__(
        self,
        capacity_pages: int | None,
        page_tokens: int,
        pages_per_block: int = 1,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        page_sizes: Sequence[int] = (1,),
        policy: Policy = SGLANGS,
    ) -> None:
        if capacity_pages is not None and capacity_pages < 1:
            raise ValueError(f"capacity_pages={capacity_pages}: a cache holds at least one page; give a larger budget")
        if chunk_tokens < page_tokens:
            raise ValueError(f"chunk_tokens={chunk_tokens}: at least one page of {page_tokens} tokens is wanted")
        self.capacity_pages, self.page_tokens = capacity_pages, page_tokens
        self.page_sizes = tuple(page_sizes)
        self.tree = Tree(pages_per_block, self.page_sizes, capacity_pages, policy)
        self._chunk_bytes = max(1, chunk_tokens // (page_tokens * pages_per_block)) * ID_BYTES
        self._private_pages = self._private_size = 0
        self.peak_pages = 0

    @property
    def size(self) -> int:
        """Of all pages in use, in the unit of `page_sizes`."""
        return self.tree.size + self._private_size

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
        level = self._level_for(final_pages - hit_pages + 1)
        if level is None:
            tree.unlock(node)
            return None
        self._make_room(prompt_pages - hit_pages + 1, level)
        running = Running(request, node, tree.count_hit(node, usable_pages), level, prompt_pages, final_pages)
        self._take(running, 1)
        return running

    def prefilled(self, running: Running) -> None:
        """The prompt is computed: insert its whole pages, chunk by chunk; make room for the answer."""
        request, blocks = running.request, running.request.blocks
        self._note_peak()
        self._take(running, -1)
        end, last = running.node.end_bytes + self._chunk_bytes, len(blocks)
        while end < last:
            self._insert(running, blocks[:end])
            end += self._chunk_bytes
        self._insert(running, blocks)
        if request.answer_tokens > 1:
            # Each decode step wants one free page, whether or not it takes it.
            before_last_step = -(-(request.prompt_tokens + request.answer_tokens - 2) // self.page_tokens)
            self._make_room(before_last_step - running.node.end_pages + 1, running.level)
        running.private_pages = running.final_pages - running.node.end_pages
        self._take(running, 1)

    def finish(self, running: Running) -> None:
        """The answer is complete: insert what is known of it, let go of the rest."""
        self._note_peak()
        self._take(running, -1)
        if running.request.stored is not None:
            self._insert(running, running.request.stored)
        self.tree.unlock(running.node)

    def _level_for(self, pages: int) -> int | None:
        """Where a request's new pages begin: as the policy says, but no finer than what fits when all else that is not
        held goes. None: it does not fit."""
        tree, sizes = self.tree, self.page_sizes
        if tree.capacity is None:
            return 0
        room = tree.capacity - self._private_size - tree.locked_size
        fits = next((level for level, size in enumerate(sizes) if pages * size <= room), None)
        if fits is None or tree.floor == 0:
            return fits
        wanted = [pages * size for size in sizes]
        rested = [tree.rested_turnovers(level) for level in range(len(sizes))]
        return max(fits, first_level(wanted, tree.capacity - self.size, tree.sinkable_size, rested))

    def _take(self, running: Running, count: int) -> None:
        """Private pages: 1 takes them, -1 gives them back."""
        self._private_pages += count * running.private_pages
        self._private_size += count * running.private_pages * self.page_sizes[running.level]

    def _make_room(self, pages: int, level: int) -> None:
        if self.tree.capacity is not None:
            short = pages * self.page_sizes[level] - (self.tree.capacity - self.size)
            if short > 0:
                self.tree.free(short)

    def _insert(self, running: Running, sequence: bytes) -> None:
        """Make `sequence`, which goes on where the request's locked path ends, resident and locked."""
        node = self.tree.insert(sequence, running.node, running.level)
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
