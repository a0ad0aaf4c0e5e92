"""The page store: every layer's packed pages and frames, and the one way into them.

    page store   pages[layer]            [pages, page_bytes] uint8    whole tiles, packed
                 frame_key_rot[layer]    [frames, H, 16, D] float16   a running request's last,
                 frame_value_rot[layer]  [frames, H, 16, D] float16   unfinished tile

                 sink_key_rot[layer]    [sinks, H, S, D] float16      a sequence's first tokens, raw as well:
                 sink_value_rot[layer]  [sinks, H, S, D] float16      attention sinks

Page i of layer l lies at i * page_bytes(l). Page 0, frame 0 and sink 0 belong to nobody: SGLang's padding
rows point there. A frame's index is the request's row in SGLang's request table, so frames need no
allocator: a request has at most one unfinished tile, and a prefix hit always ends on a page boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.context import Sinks
from deltastore_kernels.layout import RAW_BITS, TILE_TOKENS, PageLayout
from deltastore_kernels.packing import RAW_DTYPE
from deltastore_kernels.token_writes import LayerStore, TokenWrites

from .sinks import SinkTable

SINK_TOKENS = 1
"""Tokens of a sequence that are also kept raw. Queries give the first one much of their weight (attention sinks, Xiao
et al., arXiv:2309.17453), so its rounding costs more than another's. More than one brought nothing:
kernels/DECISIONS.md."""

PAGES_PER_SINK = 32
"""One sink for so many pages: sequences of 512 tokens and more all get theirs. A shorter one that finds no free
sink is read from its packed page, as every token is."""

_TABLE_ENTRY_BYTES = 24
"""Of a page table's entry: a slot (int32), its page (int64, before and after a division), the kernels' int32."""


@dataclass(frozen=True)
class StoreSize:
    """How many bytes a store takes. All byte counts cover all layers of this process.

    context_tokens: of the longest context; kernel_scratch_bytes: see deltastore_kernels.ops.scratch_bytes.
    """

    layouts: tuple[PageLayout, ...]
    num_frames: int
    context_tokens: int
    kernel_scratch_bytes: int = 0

    @property
    def page_tokens(self) -> int:
        return self.layouts[0].page_tokens

    @property
    def page_bytes(self) -> int:
        return sum(layout.page_bytes for layout in self.layouts)

    @property
    def codes_bytes(self) -> int:
        """Of a page: its key and value codes, or its raw values."""
        return sum(
            layout.num_kv_heads * layout.tiles * (layout.key_codes_bytes + layout.value_codes_bytes)
            for layout in self.layouts
        )

    @property
    def scales_bytes(self) -> int:
        """Of a page: its scales and anchors. What is left of it is padding."""
        return sum(
            layout.num_kv_heads * layout.tiles * (layout.scales_bytes + layout.anchors_bytes) for layout in self.layouts
        )

    @property
    def raw_page_bytes(self) -> int:
        return sum(layout.raw_page_bytes for layout in self.layouts)

    @property
    def bytes_per_token(self) -> float:
        """Resident bytes of one stored token, without frames."""
        return self.page_bytes / self.page_tokens

    @property
    def frames_bytes(self) -> int:
        """All frames, the padding frame 0 included."""
        return (self.num_frames + 1) * frame_bytes(self.layouts)

    @property
    def sink_bytes(self) -> int:
        """Bytes of one sequence's sink over all layers; packed layers alone need one."""
        return sum(
            layout.num_kv_heads * layout.head_dim * 2 * RAW_BITS // 8 * SINK_TOKENS
            for layout in self.layouts
            if not layout.format.is_raw
        )

    def sinks(self, num_pages: int) -> int:
        """Sinks of a store of so many pages, each layer's the same; sink 0 not among them."""
        return -(-num_pages // PAGES_PER_SINK) if self.sink_bytes else 0

    def sinks_bytes(self, num_pages: int) -> int:
        """All sinks, sink 0 included."""
        return (self.sinks(num_pages) + 1) * self.sink_bytes

    @property
    def scratch_bytes(self) -> int:
        """What a step allocates beside the store at its largest: the kernels' own, and the page table of all running
        requests' whole contexts on its way to the kernels."""
        entries = self.num_frames * -(-self.context_tokens // self.page_tokens)
        return self.kernel_scratch_bytes + entries * _TABLE_ENTRY_BYTES

    def tokens_within(self, budget_bytes: int) -> int:
        """Whole pages of tokens that fit a budget together with padding page, frames and scratch."""
        # Page 0, sink 0, and the last sink, which the division below may cut.
        left = budget_bytes - self.frames_bytes - self.scratch_bytes - self.page_bytes - 2 * self.sink_bytes
        pages = int(left / (self.page_bytes + self.sink_bytes / PAGES_PER_SINK))
        return max(pages, 0) * self.page_tokens


def frame_bytes(layouts: tuple[PageLayout, ...]) -> int:
    """Bytes of one running request's frame over all layers."""
    return sum(layout.frame_bytes for layout in layouts)


class PageStore:
    """The tensors of a store, and `write`, the only way to change them.

    `num_pages` counts the pages that requests may own, numbered 1 .. num_pages; `key_bases` are the layers'
    calibrations, where there are any.
    """

    def __init__(
        self,
        size: StoreSize,
        num_pages: int,
        device: str,
        ops: SimpleNamespace,
        key_bases: Sequence[KeyBasis | None] | None = None,
    ) -> None:
        key_bases = key_bases or [None] * len(size.layouts)
        self.size = size
        self.bases = [Basis(ops, basis and basis.to(device)) for basis in key_bases]
        self.layouts = size.layouts
        self.num_pages = num_pages
        self.ops = ops
        self.sink_table = SinkTable(size.sinks(num_pages), num_pages, device)
        # Left unset: no byte is read before `write` has set it, and untouched memory costs nothing.
        self.pages = [
            torch.empty(num_pages + 1, layout.page_bytes, dtype=torch.uint8, device=device) for layout in self.layouts
        ]
        self.sink_key_rot, self.sink_value_rot = (
            [
                torch.zeros(
                    0 if layout.format.is_raw else self.sink_table.total + 1,
                    layout.num_kv_heads, SINK_TOKENS, layout.head_dim, dtype=RAW_DTYPE, device=device,
                )
                for layout in self.layouts
            ]
            for _ in ("key", "value")
        )  # fmt: skip
        self.frame_key_rot, self.frame_value_rot = (
            [
                torch.zeros(
                    size.num_frames + 1, layout.num_kv_heads, TILE_TOKENS, layout.head_dim,
                    dtype=RAW_DTYPE, device=device,
                )
                for layout in self.layouts
            ]
            for _ in ("key", "value")
        )  # fmt: skip
        self.stored = [
            LayerStore(*tensors, basis.key_shaping)
            for *tensors, basis in zip(
                self.layouts, self.pages, self.frame_key_rot, self.frame_value_rot, self.sink_key_rot,
                self.sink_value_rot, self.bases, strict=True,
            )
        ]  # fmt: skip

    def begin_step(self, writes: TokenWrites) -> TokenWrites:
        """Before the layers' writes of a step: the same writes, with sinks for the sequences that begin in it."""
        self.sink_table.count_begun(len(writes.begun_pages) + len(writes.first_pages))
        self.sink_table.forget(writes.begun_pages)
        self.sink_table.begin(writes.first_pages)
        return self.with_sinks(writes)

    def with_sinks(self, writes: TokenWrites) -> TokenWrites:
        """The same writes, with the sinks that the pages of sequences' first tiles have now."""
        return replace(writes, first_sinks=self.sink_table.of_page[writes.first_pages].clamp_min(0))

    def write(self, layer: int, key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites) -> None:
        """Store one layer's new tokens: key_rot, value_rot [T, H, D] float, in the order of `writes`."""
        self.ops.store_tokens(key_rot, value_rot, writes, self.stored[layer])

    def sinks(self, layer: int, sink_ids: torch.Tensor) -> Sinks | None:
        """What attention reads for requests with these sinks [B] (`sink_table.of_page` of their first pages)."""
        if not len(self.sink_key_rot[layer]):
            return None
        return Sinks(self.sink_key_rot[layer], self.sink_value_rot[layer], sink_ids)

    def adopt_sinks(self, other: PageStore, their_pages: torch.Tensor, our_pages: torch.Tensor) -> None:
        """Copy the sinks of another store's pages [N] to pages of this one, as far as they have and we have room."""
        had = other.sink_table.of_page[their_pages] >= 0
        their_pages, our_pages = their_pages[had], our_pages[had]
        self.sink_table.begin(our_pages)
        ours, theirs = self.sink_table.of_page[our_pages], other.sink_table.of_page[their_pages]
        room = ours >= 0
        for to, of in ((self.sink_key_rot, other.sink_key_rot), (self.sink_value_rot, other.sink_value_rot)):
            for layer, sinks in enumerate(to):
                if len(sinks):
                    sinks[ours[room]] = of[layer][theirs[room]]

    @property
    def sinks_bytes(self) -> int:
        return sum(sinks.nbytes for sinks in (*self.sink_key_rot, *self.sink_value_rot))

    @property
    def pages_bytes(self) -> int:
        return sum(pages.nbytes for pages in self.pages)

    @property
    def frames_bytes(self) -> int:
        return sum(frames.nbytes for frames in (*self.frame_key_rot, *self.frame_value_rot))
