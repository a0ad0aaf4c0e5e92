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
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.context import Sinks
from deltastore_kernels.layout import RAW_BITS, TILE_TOKENS, PageLayout
from deltastore_kernels.packing import RAW_DTYPE, to_raw

from .sinks import SinkTable
from .writes import WritePlan

SINK_TOKENS = 1
"""Tokens of a sequence that are also kept raw. Queries give the first one much of their weight (attention sinks, Xiao
et al., arXiv:2309.17453), so its rounding costs more than another's. More than one brought nothing:
kernels/DECISIONS.md."""

PAGES_PER_SINK = 32
"""One sink for so many pages: sequences of 512 tokens and more all get theirs. A shorter one that finds no free
sink is read from its packed page, as every token is."""


@dataclass(frozen=True)
class StoreSize:
    """How many bytes a store takes. All byte counts cover all layers of this process."""

    layouts: tuple[PageLayout, ...]
    num_frames: int
    context_tokens: int

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
        """What attention needs beside the store at its largest: one request's whole context of one
        layer as floats, and as much again for the codes on their way."""
        largest = max(layout.num_kv_heads * layout.head_dim for layout in self.layouts)
        return self.context_tokens * largest * 2 * 4 * 2

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
        self.encoded_tokens = 0
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

    def begin_step(self, tiles: int, begun_pages: torch.Tensor, first_pages: torch.Tensor) -> None:
        """Before the layers' writes of a step: how many tiles it encodes, the pages whose first tile is among them,
        and (on the host) those of them that begin a sequence."""
        self.encoded_tokens += tiles * TILE_TOKENS
        # To know a GPU's page ids would mean to wait for it. A sink that a page has from another life, and keeps
        # because it is not looked at, comes back once the page is free.
        self.sink_table.place(begun_pages if begun_pages.device.type == "cpu" else first_pages, first_pages)

    def begin_planned_step(self, plan: WritePlan) -> None:
        """The same from a plan on the host."""
        self.begin_step(len(plan.page_ids), plan.page_ids[plan.tile_ids == 0], plan.first_pages)

    def write(self, layer: int, key_rot: torch.Tensor, value_rot: torch.Tensor, plan: WritePlan) -> None:
        """Store one layer's new tokens: key_rot, value_rot [T, H, D] float, in the plan's order.

        Tiles that became whole are encoded, once and for all; the rest goes to frames.
        """
        sides = ((self.frame_key_rot[layer], key_rot), (self.frame_value_rot[layer], value_rot))
        # Rounded to the frames' dtype first, so that a token's bytes do not depend on whether it
        # came with its whole tile or had to wait in a frame.
        rounded = [(frames, to_raw(new)) for frames, new in sides]
        if len(plan.page_ids):
            tiles = [_gather_tiles(frames, new, plan) for frames, new in rounded]
            self.ops.encode(
                *tiles, plan.page_ids, plan.tile_ids, self.pages[layer], self.layouts[layer],
                self.bases[layer].key_shaping,
            )  # fmt: skip
            if len(plan.first_tiles) and len(self.sink_key_rot[layer]):
                slots = self.sink_table.of_page[plan.first_pages].clamp_min(0)
                for sinks, raw in zip((self.sink_key_rot[layer], self.sink_value_rot[layer]), tiles, strict=True):
                    sinks[slots] = raw[plan.first_tiles, :, :SINK_TOKENS]
        if len(plan.rest_rows):
            for frames, new in rounded:
                frames[plan.rest_frames, :, plan.rest_lanes] = new[plan.rest_rows]

    def sinks(self, layer: int, sink_ids: torch.Tensor) -> Sinks | None:
        """What attention reads for requests with these sinks [B] (`sink_table.of_page` of their first pages)."""
        if not len(self.sink_key_rot[layer]):
            return None
        return Sinks(self.sink_key_rot[layer], self.sink_value_rot[layer], sink_ids)

    def adopt_sinks(self, other: PageStore, their_pages: torch.Tensor, our_pages: torch.Tensor) -> None:
        """Copy the sinks of another store's pages [N] to pages of this one, as far as they have and we have room."""
        theirs = other.sink_table.of_page[their_pages]
        had = theirs >= 0
        ours = torch.tensor(self.sink_table.adopt(our_pages[had].tolist()), dtype=torch.int64)
        theirs = theirs[had][: len(ours)]
        for to, of in ((self.sink_key_rot, other.sink_key_rot), (self.sink_value_rot, other.sink_value_rot)):
            for layer, sinks in enumerate(to):
                if len(sinks):
                    sinks[ours] = of[layer][theirs]

    @property
    def sinks_bytes(self) -> int:
        return sum(sinks.nbytes for sinks in (*self.sink_key_rot, *self.sink_value_rot))

    @property
    def pages_bytes(self) -> int:
        return sum(pages.nbytes for pages in self.pages)

    @property
    def frames_bytes(self) -> int:
        return sum(frames.nbytes for frames in (*self.frame_key_rot, *self.frame_value_rot))


def _gather_tiles(frames: torch.Tensor, new: torch.Tensor, plan: WritePlan) -> torch.Tensor:
    """The plan's whole tiles [N, H, 16, D] from the frames and the new tokens [T, H, D]."""
    tiles = new[plan.tile_sources.clamp_min(0)].transpose(1, 2)
    if plan.takes_frames:
        tiles = torch.where((plan.tile_sources < 0)[:, None, :, None], frames[plan.tile_frames], tiles)
    return tiles
