"""How many bytes a store takes: pages, frames, sinks, and what a step needs beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from deltastore_kernels.layout import RAW_BITS, PageLayout

SINK_TOKENS = 1
"""Tokens of a sequence that are also kept raw. Queries give the first one much of their weight (attention sinks, Xiao
et al., arXiv:2309.17453), so its rounding costs more than another's. More than one brought nothing:
kernels/DECISIONS.md."""

PAGES_PER_SINK = 32
"""Beside a sink for each frame there is one for so many pages: sequences of 512 tokens and more can all be cached,
though each begin with another token. Where they begin alike, as behind a template, a handful serves them all."""

_TABLE_ENTRY_BYTES = 24
"""Of a page table's entry: a slot (int32), its page (int64, before and after a division), the kernels' int32."""


@dataclass(frozen=True)
class StoreSize:
    """How many bytes a store takes. All byte counts cover all layers of this process.

    context_tokens: of the longest context; kernel_scratch_bytes: see deltastore_kernels.ops.scratch_bytes;
    pages_per_sink: infinite where no sequence is cached but those that have frames;
    window_layers: of each layer, whether its pages behind its window are freed; empty: none's. They are a part of the
    store with window_share pages for each page of the other layers;
    draft_tokens: that a step may bring of each running request before anybody knows which of them stay; 0: none. At
    most a tile's: with them a request can have two unfinished tiles, and has two frames;
    fine_layouts: of each layer, where pages begin and stay while there is room; `layouts` are what they sink to then
    (levels.py). Empty: pages are of one level;
    draft_pool_token_bytes: of a draft model's own KV, which has a slot for each of the store's and lies beside it;
    stock_shares: of each layer, tokens that SGLang's own pool keeps for every token of its capacity: less than one of
    a layer with a window behind which it frees pages. Empty: one, of all.
    """

    layouts: tuple[PageLayout, ...]
    num_frames: int
    context_tokens: int
    kernel_scratch_bytes: int = 0
    pages_per_sink: float = PAGES_PER_SINK
    window_layers: tuple[bool, ...] = ()
    window_share: float = 1.0
    stock_shares: tuple[float, ...] = ()
    draft_tokens: int = 0
    fine_layouts: tuple[PageLayout, ...] = ()
    draft_pool_token_bytes: int = 0

    @property
    def page_tokens(self) -> int:
        return self.layouts[0].page_tokens

    @property
    def has_windows(self) -> bool:
        """Whether the store has a part for layers with windows."""
        return any(self.window_layers)

    def window_pages(self, num_pages: int) -> int:
        """Pages of each of window_layers, where the others have so many; page 0 is in neither number."""
        return int(num_pages * self.window_share) if self.has_windows else 0

    @property
    def page_bytes(self) -> int:
        """Of a page that every layer has."""
        return self.pages_bytes(1, 1)

    def pages_bytes(self, pages: int, window_pages: int) -> int:
        """Of so many pages in each layer, and so many in each of window_layers."""
        return self._over_layers(lambda layout: layout.page_bytes, pages, window_pages)

    @property
    def layouts_by_level(self) -> tuple[tuple[PageLayout, ...], ...]:
        """Of all layers, finest first."""
        return (self.fine_layouts, self.layouts) if self.fine_layouts else (self.layouts,)

    @property
    def level_bytes(self) -> list[tuple[int, int]]:
        """Of each layer, a fine and a coarse page's; empty: pages are of one level."""
        return [
            (fine.page_bytes, coarse.page_bytes)
            for fine, coarse in zip(self.fine_layouts, self.layouts, strict=bool(self.fine_layouts))
        ]

    def codes_bytes(self, pages: int, window_pages: int) -> int:
        """Of the same: key and value codes, or raw values."""
        return self._over_layers(
            lambda layout: layout.num_kv_heads * layout.tiles * (layout.key_codes_bytes + layout.value_codes_bytes),
            pages, window_pages,
        )  # fmt: skip

    def scales_bytes(self, pages: int, window_pages: int) -> int:
        """Of the same: scales and anchors. What is left is padding."""
        return self._over_layers(
            lambda layout: layout.num_kv_heads * layout.tiles * (layout.scales_bytes + layout.anchors_bytes),
            pages, window_pages,
        )  # fmt: skip

    def raw_bytes(self, pages: int, window_pages: int) -> int:
        """Of as many tokens as 16-bit floats."""
        return self._over_layers(lambda layout: layout.raw_page_bytes, pages, window_pages)

    def _over_layers(self, bytes_of: Callable[[PageLayout], int], pages: int, window_pages: int) -> int:
        in_windows = self.window_layers or (False,) * len(self.layouts)
        return sum(
            bytes_of(layout) * (window_pages if has_window else pages)
            for layout, has_window in zip(self.layouts, in_windows, strict=True)
        )

    @property
    def stock_page_bytes(self) -> float:
        """What as many tokens take in SGLang's own pool of 16-bit floats, at its own settings."""
        shares = self.stock_shares or (1.0,) * len(self.layouts)
        return sum(layout.raw_page_bytes * share for layout, share in zip(self.layouts, shares, strict=True))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of pages for one token of capacity: of layers with windows, their share."""
        return (self.pages_bytes(1, 0) + self.window_share * self.pages_bytes(0, 1)) / self.page_tokens

    @property
    def frames_bytes(self) -> int:
        """All frames, the padding frame 0 included."""
        return (self.num_frames + 1) * self.frame_bytes

    @property
    def frame_bytes(self) -> int:
        """Bytes of one running request's frames over all layers."""
        return self.frames_each * sum(layout.frame_bytes for layout in self.layouts)

    @property
    def frames_each(self) -> int:
        """Of a running request."""
        return 2 if self.draft_tokens else 1

    @property
    def sink_bytes(self) -> int:
        """Bytes of one sink over all layers; packed layers alone need one."""
        return sum(
            layout.num_kv_heads * layout.head_dim * 2 * RAW_BITS // 8 * SINK_TOKENS
            for layout in self.layouts
            if not layout.format.is_raw
        )

    def sinks(self, num_pages: int) -> int:
        """Sinks of a store of so many pages, each layer's the same; sink 0 not among them."""
        return self.num_frames + math.ceil(num_pages / self.pages_per_sink) if self.sink_bytes else 0

    def sinks_bytes(self, num_pages: int) -> int:
        """All sinks, sink 0 included."""
        return (self.sinks(num_pages) + 1) * self.sink_bytes

    @property
    def scratch_bytes(self) -> int:
        """What a step allocates beside the store at its largest: the kernels' own, and the page tables of all running
        requests' whole contexts on their way to the kernels, one for each part of the store."""
        entries = self.num_frames * -(-self.context_tokens // self.page_tokens) * (1 + self.has_windows)
        return self.kernel_scratch_bytes + entries * _TABLE_ENTRY_BYTES

    def draft_pool_bytes(self, num_pages: int) -> int:
        """Of a draft model's own KV beside a store of so many pages, its page 0 included."""
        return (num_pages + 1) * self.page_tokens * self.draft_pool_token_bytes

    def tokens_within(self, budget_bytes: int) -> int:
        """Whole pages of tokens that fit a budget together with padding page, frames, scratch, and a draft model's own
        KV."""
        # Of sinks what needs no page, and the last one, which the division below may cut.
        sinks_bytes = self.sinks_bytes(0) + self.sink_bytes
        left = budget_bytes - self.frames_bytes - self.scratch_bytes - self.page_bytes - sinks_bytes
        left -= self.draft_pool_bytes(0)
        token_bytes = self.bytes_per_token + self.draft_pool_token_bytes
        pages = int(left / (token_bytes * self.page_tokens + self.sink_bytes / self.pages_per_sink))
        return max(pages, 0) * self.page_tokens
