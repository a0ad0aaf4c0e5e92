"""store_tokens: a step's new tokens of one layer into its pages, frames and sinks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...context import LayerStore
from ...layout import NO_PAGE
from ...packing import to_raw
from ...token_writes import TokenWrites
from ..encode.reference import encode


def store_tokens(key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites, store: LayerStore) -> None:
    """Store T new tokens as `writes` says: whole tiles into pages, encoded once and for all, the rest into frames, and
    the first tokens of sequences raw into sinks as well.

    key_rot, value_rot [T, H, D] float, in the stored basis; the tensors of `store` are written.
    """
    store_with(encode, key_rot, value_rot, writes, store)


def store_with(
    encode: Callable[..., None],
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    writes: TokenWrites,
    store: LayerStore,
) -> None:
    """The same in torch around any backend's `encode`."""
    # Rounded to the frames' dtype first, so that a token's bytes do not depend on whether it came with its whole tile
    # or had to wait in a frame.
    sides = ((store.frame_key_rot, to_raw(key_rot)), (store.frame_value_rot, to_raw(value_rot)))
    if len(writes.page_ids):
        tiles = [_gather_tiles(frames, new, writes) for frames, new in sides]
        coarse = store.coarse
        # Of either kind, what goes to the other goes nowhere.
        finer_ids = writes.page_ids if coarse is None else writes.page_ids.clamp_min(NO_PAGE)
        encode(*tiles, finer_ids, writes.tile_ids, store.pages, store.layout, store.key_shaping)
        if coarse is not None:
            from_start = writes.page_ids + len(coarse.pages)
            coarse_ids = torch.where(writes.page_ids < NO_PAGE, from_start, NO_PAGE)
            encode(*tiles, coarse_ids, writes.tile_ids, coarse.pages, coarse.layout, store.key_shaping)
    if len(writes.rest_rows):
        for frames, new in sides:
            frames[writes.rest_frames, :, writes.rest_lanes] = new[writes.rest_rows]
    if len(writes.sink_rows) and store.sink_tokens:
        for sinks, (_, new) in zip((store.sink_key_rot, store.sink_value_rot), sides, strict=True):
            for token in range(store.sink_tokens):
                sinks[writes.sink_ids, :, token] = new[writes.sink_rows + token]


def _gather_tiles(frames: torch.Tensor, new: torch.Tensor, writes: TokenWrites) -> torch.Tensor:
    """The whole tiles [N, H, 16, D] from the frames and the new tokens [T, H, D]."""
    tiles = new[writes.tile_rows].transpose(1, 2)
    if writes.takes_frames:
        tiles = torch.where(writes.waits_in_frame, frames[writes.tile_frames], tiles)
    return tiles
