"""Where a step's new tokens go, and what a layer has for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import PageLayout


@dataclass(frozen=True)
class TokenWrites:
    """Where a step's T new tokens go; the same for all layers. Tensors lie on the store's device.

    Whole tiles are encoded at once, the rest waits in the request's frame:

        tile_sources  [N, 16] row among the new tokens, or -1: the token waits in the frame
        tile_frames   [N] frame of the tile's request
        page_ids, tile_ids  [N] where the tile goes; page NO_PAGE: nowhere
        first_tiles   [F] which of the N tiles begin a sequence, first_pages [F] their pages, or 0
        first_sinks   [F] the sinks that take those tiles' first tokens as well; 0: nobody's
        begun_pages   [any] pages whose first tile is among the N, and that do not begin a sequence; 0 may be there
        rest_rows     [M] new tokens that go to a frame, rest_frames [M], rest_lanes [M] where
        takes_frames  whether any tile has tokens that waited
    """

    tile_sources: torch.Tensor
    tile_frames: torch.Tensor
    page_ids: torch.Tensor
    tile_ids: torch.Tensor
    first_tiles: torch.Tensor
    first_pages: torch.Tensor
    first_sinks: torch.Tensor
    begun_pages: torch.Tensor
    rest_rows: torch.Tensor
    rest_frames: torch.Tensor
    rest_lanes: torch.Tensor
    takes_frames: bool


@dataclass(frozen=True)
class LayerStore:
    """One layer's stored tokens.

    pages                           [pages, page_bytes] uint8
    frame_key_rot, frame_value_rot  [frames, H, 16, D] float16
    sink_key_rot, sink_value_rot    [sinks, H, S, D] float16; no sinks where pages are raw
    key_shaping                     [H, D, D] float32 where keys are calibrated (ops/encode/reference.py: _shaped)
    """

    layout: PageLayout
    pages: torch.Tensor
    frame_key_rot: torch.Tensor
    frame_value_rot: torch.Tensor
    sink_key_rot: torch.Tensor
    sink_value_rot: torch.Tensor
    key_shaping: torch.Tensor | None = None
