"""Where a step's new tokens go: whole tiles into pages, the rest into frames."""

from __future__ import annotations

from dataclasses import replace

import torch

from deltastore_kernels.layout import NO_PAGE, TILE_TOKENS
from deltastore_kernels.token_writes import TokenWrites
from deltastore_kernels.transfer import all_to_device


def plan_writes(
    prefix_tokens: torch.Tensor,
    new_tokens: torch.Tensor,
    frame_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_tokens: int,
    sink_ids: torch.Tensor,
    frame_stride: int = 0,
) -> TokenWrites:
    """Plan where any number of new tokens go. Lengths decide it, which the host knows: nothing waits for the device.

    prefix_tokens, new_tokens [B] int64 on the host: stored before, and new in this step; frame_ids [B] int64 and
    page_table [B, pages] int64 on the device; sink_ids [B] int64 on the host: where the first new token of a request
    goes raw as well, 0: nowhere; frame_stride: see PageStore. The new tokens of the requests follow one another.
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
    whole_tile, sources = tile[whole], rows[whole]
    on_host = (
        request[whole],
        whole_tile // tiles_per_page,
        whole_tile % tiles_per_page,
        sources,
        request[rest_tile],
        rows[rest_tile, rest_lanes],
        rest_lanes,
        first_row[sink_ids > 0],
        sink_ids[sink_ids > 0],
        whole_tile,
        tile[rest_tile],
    )
    requests, columns, tile_ids, tile_sources, rest_requests, rest_rows, rest_lanes, sink_rows, sink_ids, *tiles = (
        all_to_device(on_host, page_table.device)
    )
    return TokenWrites(
        tile_sources=tile_sources,
        tile_frames=frames_of(frame_ids[requests], tiles[0], frame_stride),
        page_ids=page_table[requests, columns],
        tile_ids=tile_ids,
        rest_rows=rest_rows,
        rest_frames=frames_of(frame_ids[rest_requests], tiles[1], frame_stride),
        rest_lanes=rest_lanes,
        sink_rows=sink_rows,
        sink_ids=sink_ids,
        takes_frames=bool((sources < 0).any()),
    )


def plan_decode_writes(
    total_tokens: torch.Tensor,
    frame_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_tokens: int,
    frame_stride: int = 0,
) -> TokenWrites:
    """As `plan_writes` for one new token of each of B requests, in shapes that depend on B alone and without a look
    at any value: a CUDA graph can hold it. Every token goes to its frame, and every request has a tile, mostly one
    that goes nowhere. No sequence begins with such a step.

    total_tokens [B] int64: tokens of each request, the new one included.
    """
    position = total_tokens - 1
    lanes, tile = position % TILE_TOKENS, position // TILE_TOKENS
    rows = torch.arange(len(position), device=position.device)
    page = page_table.gather(1, (position // page_tokens)[:, None])[:, 0]
    whole = lanes == TILE_TOKENS - 1
    sources = torch.full((len(rows), TILE_TOKENS), -1, dtype=torch.int64, device=rows.device)
    sources[:, -1] = rows
    frames = frames_of(frame_ids, tile, frame_stride)
    return TokenWrites(
        tile_sources=sources,
        tile_frames=frames,
        page_ids=torch.where(whole, page, NO_PAGE),
        tile_ids=tile % (page_tokens // TILE_TOKENS),
        rest_rows=rows,
        rest_frames=frames,
        rest_lanes=lanes,
        sink_rows=rows[:0],
        sink_ids=rows[:0],
        takes_frames=True,
        refills_frames=False,
    )


def plan_draft_writes(
    total_tokens: torch.Tensor,
    frame_ids: torch.Tensor,
    page_table: torch.Tensor,
    page_tokens: int,
    new_tokens: int,
    frame_stride: int,
) -> TokenWrites:
    """As `plan_decode_writes` for as many new tokens of each request, at most TILE_TOKENS."""
    device = total_tokens.device
    before = total_tokens - new_tokens
    first_row = torch.arange(len(before), device=device)[:, None] * new_tokens
    position = before[:, None] + torch.arange(new_tokens, device=device)

    tile = before // TILE_TOKENS
    page = page_table.gather(1, (tile * TILE_TOKENS // page_tokens)[:, None])[:, 0]
    whole = total_tokens // TILE_TOKENS > tile
    from_new = torch.arange(TILE_TOKENS, device=device) - (before % TILE_TOKENS)[:, None]
    # Of a tile that goes nowhere there may be fewer.
    sources = torch.where(from_new >= 0, first_row + from_new.clamp_max(new_tokens - 1), -1)
    rows = torch.arange(position.numel(), device=device)
    return TokenWrites(
        tile_sources=sources,
        tile_frames=frames_of(frame_ids, tile, frame_stride),
        page_ids=torch.where(whole, page, NO_PAGE),
        tile_ids=tile % (page_tokens // TILE_TOKENS),
        rest_rows=rows,
        rest_frames=frames_of(frame_ids[:, None], position // TILE_TOKENS, frame_stride).flatten(),
        rest_lanes=(position % TILE_TOKENS).flatten(),
        sink_rows=rows[:0],
        sink_ids=rows[:0],
        takes_frames=True,
        refills_frames=False,  # what drafts begin behind a whole tile goes to the other frame
    )


def frames_of(frame_ids: torch.Tensor, tiles: torch.Tensor, frame_stride: int) -> torch.Tensor:
    """Requests' frame_ids and numbers of their tiles, int, of shapes that go together -> the frames of those tiles."""
    return frame_ids + frame_stride * (tiles % 2) if frame_stride else frame_ids


def without_unfinished(plan: TokenWrites) -> TokenWrites:
    """The same without tiles that go nowhere, for a host, where looking at values costs nothing."""
    whole = plan.page_ids != NO_PAGE
    tiles = {name: getattr(plan, name)[whole] for name in ("tile_sources", "tile_frames", "page_ids", "tile_ids")}
    return replace(plan, **tiles)


def _ranges(counts: torch.Tensor) -> torch.Tensor:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    starts = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    return torch.arange(int(counts.sum())) - starts
