"""The page store: every layer's packed pages and frames, and the one way into them.

    page store   pages[layer]            [pages, page_bytes] uint8    whole tiles, packed
                 frame_key_rot[layer]    [frames, H, 16, D] float16   a running request's last,
                 frame_value_rot[layer]  [frames, H, 16, D] float16   unfinished tile

                 sink_key_rot[layer]    [sinks, H, S, D] float16      a sequence's first tokens, raw as well:
                 sink_value_rot[layer]  [sinks, H, S, D] float16      attention sinks

Page i of layer l lies at i * page_bytes(l). Page 0 and frame 0 belong to nobody: SGLang's padding
rows point there. A frame's index is the request's row in SGLang's request table, so frames need no
allocator: a request has at most one unfinished tile, and a prefix hit always ends on a page boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.context import Sinks
from deltastore_kernels.layout import RAW_BITS, TILE_TOKENS, PageLayout
from deltastore_kernels.packing import RAW_DTYPE, to_raw

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
        """Sinks of a store of so many pages, each layer's the same."""
        return -(-num_pages // PAGES_PER_SINK) if self.sink_bytes else 0

    @property
    def scratch_bytes(self) -> int:
        """What attention needs beside the store at its largest: one request's whole context of one
        layer as floats, and as much again for the codes on their way."""
        largest = max(layout.num_kv_heads * layout.head_dim for layout in self.layouts)
        return self.context_tokens * largest * 2 * 4 * 2

    def tokens_within(self, budget_bytes: int) -> int:
        """Whole pages of tokens that fit a budget together with padding page, frames and scratch."""
        left = budget_bytes - self.frames_bytes - self.scratch_bytes - self.page_bytes - self.sink_bytes
        pages = int(left / (self.page_bytes + self.sink_bytes / PAGES_PER_SINK))
        return max(pages, 0) * self.page_tokens


def frame_bytes(layouts: tuple[PageLayout, ...]) -> int:
    """Bytes of one running request's frame over all layers."""
    return sum(layout.frame_bytes for layout in layouts)


@dataclass(frozen=True)
class WritePlan:
    """Where a step's T new tokens go; the same for all layers.

    Whole tiles are encoded at once, the rest waits in the request's frame:

        tile_sources  [N, 16] row among the new tokens, or -1: the token waits in the frame
        tile_frames   [N] frame of the tile's request
        page_ids, tile_ids  [N] where the tile goes
        first_tiles   [F] which of the N tiles begin a sequence
        rest_rows     [M] new tokens that stay in a frame, rest_frames [M], rest_lanes [M] where
    """

    tile_sources: torch.Tensor
    tile_frames: torch.Tensor
    page_ids: torch.Tensor
    tile_ids: torch.Tensor
    first_tiles: torch.Tensor
    rest_rows: torch.Tensor
    rest_frames: torch.Tensor
    rest_lanes: torch.Tensor


def plan_writes(
    prefix_tokens: torch.Tensor,
    new_tokens: torch.Tensor,
    frame_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_tokens: int,
) -> WritePlan:
    """Plan where new tokens go.

    prefix_tokens, new_tokens [B] int64: stored before, and new in this step; frame_ids [B] int64;
    page_table [B, pages] int64. The new tokens of the requests follow one another.
    """
    # One row for each tile that this step touches.
    first_tile = prefix_tokens // TILE_TOKENS
    last_tile = (prefix_tokens + new_tokens - 1) // TILE_TOKENS
    touched = torch.where(new_tokens > 0, last_tile - first_tile + 1, 0)
    request = torch.repeat_interleave(torch.arange(len(touched)), touched)
    tile = _ranges(touched) + first_tile[request]
    position = tile[:, None] * TILE_TOKENS + torch.arange(TILE_TOKENS)

    first_row = torch.cumsum(new_tokens, 0) - new_tokens
    from_new = position - prefix_tokens[request, None]
    rows = torch.where(from_new >= 0, first_row[request, None] + from_new, -1)
    inside = position < (prefix_tokens + new_tokens)[request, None]
    whole = inside[:, -1]

    rest = inside & (rows >= 0) & ~whole[:, None]
    rest_tile, rest_lanes = rest.nonzero(as_tuple=True)
    tiles_per_page = page_tokens // TILE_TOKENS
    return WritePlan(
        tile_sources=rows[whole],
        tile_frames=frame_ids[request[whole]],
        page_ids=page_table[request[whole], tile[whole] // tiles_per_page],
        tile_ids=tile[whole] % tiles_per_page,
        first_tiles=(tile[whole] == 0).nonzero().flatten(),
        rest_rows=rows[rest_tile, rest_lanes],
        rest_frames=frame_ids[request[rest_tile]],
        rest_lanes=rest_lanes,
    )


def _ranges(counts: torch.Tensor) -> torch.Tensor:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    starts = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return torch.arange(int(counts.sum())) - starts


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
        self.sinks_missed = 0
        # Pages that belong to nobody now; whoever owns the pages may set it. Their sinks are then taken back when
        # none is free.
        self.free_pages: Callable[[], torch.Tensor] = lambda: torch.empty(0, dtype=torch.int64)
        self.num_sinks = size.sinks(num_pages)
        self._free_sinks = list(range(self.num_sinks))
        self.sink_of_page = torch.full((num_pages + 1,), -1, dtype=torch.int64, device=device)
        # Left unset: no byte is read before `write` has set it, and untouched memory costs nothing.
        self.pages = [
            torch.empty(num_pages + 1, layout.page_bytes, dtype=torch.uint8, device=device) for layout in self.layouts
        ]
        self.sink_key_rot, self.sink_value_rot = (
            [
                torch.zeros(
                    0 if layout.format.is_raw else self.num_sinks, layout.num_kv_heads, SINK_TOKENS, layout.head_dim,
                    dtype=RAW_DTYPE, device=device,
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

    def write(self, layer: int, key_rot: torch.Tensor, value_rot: torch.Tensor, plan: WritePlan) -> None:
        """Store one layer's new tokens: key_rot, value_rot [T, H, D] float, in the plan's order.

        Tiles that became whole are encoded, once and for all; the rest goes to frames.
        """
        sides = ((self.frame_key_rot[layer], key_rot), (self.frame_value_rot[layer], value_rot))
        # Rounded to the frames' dtype first, so that a token's bytes do not depend on whether it
        # came with its whole tile or had to wait in a frame.
        rounded = [(frames, to_raw(new)) for frames, new in sides]
        if layer == 0:
            self.encoded_tokens += len(plan.page_ids) * TILE_TOKENS
            self._place_sinks(plan)
        if len(plan.page_ids):
            tiles = [_gather_tiles(frames, new, plan) for frames, new in rounded]
            self.ops.encode(
                *tiles, plan.page_ids, plan.tile_ids, self.pages[layer], self.layouts[layer],
                self.bases[layer].key_shaping,
            )  # fmt: skip
            if len(plan.first_tiles) and len(self.sink_key_rot[layer]):
                slots = self.sink_of_page[plan.page_ids[plan.first_tiles]]
                for sinks, raw in zip((self.sink_key_rot[layer], self.sink_value_rot[layer]), tiles, strict=True):
                    sinks[slots[slots >= 0]] = raw[plan.first_tiles[slots >= 0], :, :SINK_TOKENS]
        if len(plan.rest_rows):
            for frames, new in rounded:
                frames[plan.rest_frames, :, plan.rest_lanes] = new[plan.rest_rows]

    def sinks(self, layer: int, first_pages: torch.Tensor) -> Sinks | None:
        """What attention reads for requests whose context begins with these pages [B]."""
        if not len(self.sink_key_rot[layer]):
            return None
        return Sinks(self.sink_key_rot[layer], self.sink_value_rot[layer], self.sink_of_page[first_pages])

    def _place_sinks(self, plan: WritePlan) -> None:
        """Give every page that now begins a sequence a sink; a page that begins another life loses its own."""
        if not self.num_sinks or not len(plan.page_ids):
            return
        begun = plan.page_ids[plan.tile_ids == 0]
        self._release_sinks(begun)
        if not len(plan.first_tiles):
            return
        pages = plan.page_ids[plan.first_tiles]
        if len(pages) > len(self._free_sinks):
            self._release_sinks(self.free_pages())
        count = min(len(pages), len(self._free_sinks))
        self.sinks_missed += len(pages) - count
        if count:
            slots = [self._free_sinks.pop() for _ in range(count)]
            self.sink_of_page[pages[:count]] = torch.tensor(slots, device=self.sink_of_page.device)

    def _release_sinks(self, pages: torch.Tensor) -> None:
        slots = self.sink_of_page[pages]
        self._free_sinks.extend(slots[slots >= 0].tolist())
        self.sink_of_page[pages] = -1

    def adopt_sinks(self, other: PageStore, their_pages: torch.Tensor, our_pages: torch.Tensor) -> None:
        """Copy the sinks of another store's pages [N] to pages of this one, as far as they have and we have room."""
        for theirs, ours in zip(other.sink_of_page[their_pages].tolist(), our_pages.tolist(), strict=True):
            if theirs < 0 or not self._free_sinks:
                continue
            slot = self._free_sinks.pop()
            self.sink_of_page[ours] = slot
            for to, of in ((self.sink_key_rot, other.sink_key_rot), (self.sink_value_rot, other.sink_value_rot)):
                for layer, sinks in enumerate(to):
                    sinks[slot : slot + 1] = of[layer][theirs : theirs + 1]

    @property
    def sinks_bytes(self) -> int:
        return sum(sinks.nbytes for sinks in (*self.sink_key_rot, *self.sink_value_rot))

    @property
    def sinks_free(self) -> int:
        return len(self._free_sinks)

    @property
    def pages_bytes(self) -> int:
        return sum(pages.nbytes for pages in self.pages)

    @property
    def frames_bytes(self) -> int:
        return sum(frames.nbytes for frames in (*self.frame_key_rot, *self.frame_value_rot))


def _gather_tiles(frames: torch.Tensor, new: torch.Tensor, plan: WritePlan) -> torch.Tensor:
    """The plan's whole tiles [N, H, 16, D] from the frames and the new tokens [T, H, D]."""
    tiles = new[plan.tile_sources.clamp_min(0)].transpose(1, 2)
    waiting = plan.tile_sources < 0
    if waiting.any():
        tiles = torch.where(waiting[:, None, :, None], frames[plan.tile_frames], tiles)
    return tiles
