"""decode in C++ (csrc/cpu/decode_tile.cpp)."""

from __future__ import annotations

import torch

from ... import native
from ...layout import PageLayout


def decode(pages: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin, bit for bit but for the rounding of a tile's 2**x (one unit in the last place)."""
    # Heads first, as attention wants them; callers see the twin's order.
    shape = (layout.num_kv_heads, len(page_ids) * layout.page_tokens, layout.head_dim)
    sides = torch.empty(2, *shape)
    native.decode(pages, page_ids, layout, sides[0], sides[1])
    key_rot, value_rot = sides.unflatten(2, (len(page_ids), layout.page_tokens)).transpose(1, 2)
    return key_rot, value_rot
