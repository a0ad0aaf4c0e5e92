"""Where a step's new tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class TokenWrites:
    """Where a step's T new tokens go; the same for all layers. Tensors lie on the store's device.

    Whole tiles are encoded at once, the rest waits in the request's frame:

        tile_sources  [N, 16] row among the new tokens, or -1: the token waits in the frame
        tile_frames   [N] frame of the tile's request
        page_ids, tile_ids  [N] where the tile goes; page NO_PAGE: nowhere
        rest_rows     [M] new tokens that go to a frame, rest_frames [M], rest_lanes [M] where
        sink_rows     [F] new tokens that go raw into a sink as well, with those that follow if a sink takes more;
        sink_ids      [F] where
        takes_frames  whether any tile has tokens that waited
        refills_frames  whether such a token's lane may be among those that this step writes: not where each request
                      brings one token, or has another frame for the next tile
    """

    tile_sources: torch.Tensor
    tile_frames: torch.Tensor
    page_ids: torch.Tensor
    tile_ids: torch.Tensor
    rest_rows: torch.Tensor
    rest_frames: torch.Tensor
    rest_lanes: torch.Tensor
    sink_rows: torch.Tensor
    sink_ids: torch.Tensor
    takes_frames: bool
    refills_frames: bool = True

    @cached_property
    def tile_rows(self) -> torch.Tensor:
        """[N, 16] int64: `tile_sources`, and any row where the token waits in the frame."""
        return self.tile_sources.clamp_min(0)

    @cached_property
    def waits_in_frame(self) -> torch.Tensor:
        """[N, 1, 16, 1] bool: which of the tiles' tokens wait in the frame."""
        return (self.tile_sources < 0)[:, None, :, None]
