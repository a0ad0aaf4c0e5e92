"""encode in C++ (csrc/cpu/encode_tile.cpp): the same bytes on every instruction set."""

from __future__ import annotations

import torch

from ... import native
from ...layout import PageLayout
from . import reference


def encode(
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    page_ids: torch.Tensor,
    tile_ids: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    key_shaping: torch.Tensor | None = None,
) -> None:
    """As the twin. Its float32 sums and logarithms are taken in another order, so near ties between two
    scales or codes may fall the other way (tests/budgets.py: BACKEND_SCALES_DIFFER)."""
    if layout.format.is_raw:
        reference.encode(key_rot, value_rot, page_ids, tile_ids, pages, layout)  # a copy
        return
    sides = (_rows(key_rot), _rows(value_rot))
    if sides[0].dtype != sides[1].dtype:
        sides = (sides[0].float(), sides[1].float())
    native.encode(*sides, page_ids, tile_ids, pages, layout, key_shaping)


def _rows(tiles: torch.Tensor) -> torch.Tensor:
    tiles = tiles if tiles.dtype == torch.float16 else tiles.float()
    return tiles if tiles.stride(-1) == 1 else tiles.contiguous()
