"""The page store: every layer's packed pages and frames, and the one way into them.

    page store   pages[layer]            [pages, page_bytes] uint8    whole tiles, packed
                 frame_key_rot[layer]    [frames, H, 16, D] float16   a running request's last,
                 frame_value_rot[layer]  [frames, H, 16, D] float16   unfinished tile

Page i of layer l lies at i * page_bytes(l). Page 0 and frame 0 belong to nobody: SGLang's padding
rows point there. A frame's index is the request's row in SGLang's request table, so frames need no
allocator: a request has at most one unfinished tile, and a prefix hit always ends on a page boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from deltastore_kernels.layout import TILE_TOKENS, PageLayout
from deltastore_kernels.packing import RAW_DTYPE, to_raw


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
    def scratch_bytes(self) -> int:
        """What attention needs beside the store at its largest: one request's whole context of one
        layer as floats, and as much again for the codes on their way."""
        largest = max(layout.num_kv_heads * layout.head_dim for layout in self.layouts)
        return self.context_tokens * largest * 2 * 4 * 2

    def tokens_within(self, budget_bytes: int) -> int:
        """Whole pages of tokens that fit a budget together with padding page, frames and scratch."""
        left = budget_bytes - self.frames_bytes - self.scratch_bytes - self.page_bytes
        return max(left // self.page_bytes, 0) * self.page_tokens


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
        rest_rows     [M] new tokens that stay in a frame, rest_frames [M], rest_lanes [M] where
    """

    tile_sources: torch.Tensor
    tile_frames: torch.Tensor
    page_ids: torch.Tensor
    tile_ids: torch.Tensor
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

    `num_pages` counts the pages that requests may own, numbered 1 .. num_pages.
    """

    def __init__(self, size: StoreSize, num_pages: int, device: str, ops: SimpleNamespace) -> None:
        self.size = size
        self.layouts = size.layouts
        self.num_pages = num_pages
        self.ops = ops
        self.encoded_tokens = 0
        # Left unset: no byte is read before `write` has set it, and untouched memory costs nothing.
        self.pages = [
            torch.empty(num_pages + 1, layout.page_bytes, dtype=torch.uint8, device=device) for layout in self.layouts
        ]
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
        if len(plan.page_ids):
            tiles = [_gather_tiles(frames, new, plan) for frames, new in rounded]
            self.ops.encode(*tiles, plan.page_ids, plan.tile_ids, self.pages[layer], self.layouts[layer])
        if len(plan.rest_rows):
            for frames, new in rounded:
                frames[plan.rest_frames, :, plan.rest_lanes] = new[plan.rest_rows]
        if layer == 0:
            self.encoded_tokens += len(plan.page_ids) * TILE_TOKENS

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
