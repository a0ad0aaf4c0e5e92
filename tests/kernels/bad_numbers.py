"""Tiles with numbers that no model means, and what encode owes the rest of such a tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from deltastore_kernels import codec, packing
from deltastore_kernels.layout import PACKED_BITS, Format, PageLayout
from tests.kernels.attention_case import gaussian, key_basis

HEADS = 2
HUGE = (6e4, 65504.0, 1e5, 3e38, float("inf"))
"""The first two are finite in float16."""


@dataclass(frozen=True)
class BadTile:
    """One tile of Gaussian keys and values, with `bad` in the first `dims` dims of some `tokens` of head 0."""

    fmt: Format
    head_dim: int
    dtype: torch.dtype
    bad: float
    tokens: tuple[int, ...]
    dims: int
    shaped: bool

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.fmt, HEADS, self.head_dim, 16)

    @property
    def shaping(self) -> torch.Tensor | None:
        return key_basis(HEADS, self.head_dim, seed=5).shaping if self.shaped else None

    def sides(self, instead: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, H, 16, D]; `instead`: all dims of the bad tokens are this."""
        sides = []
        for seed in (1, 2):
            side = gaussian(1, HEADS, 16, self.head_dim, seed=seed).to(self.dtype)
            if instead is None:
                side[0, 0, list(self.tokens), : self.dims] = self.bad
            else:
                side[0, 0, list(self.tokens)] = instead
            sides.append(side)
        return sides[0], sides[1]


@st.composite
def bad_tiles(draw: st.DrawFn, head_dims: tuple[int, ...], bad: tuple[float, ...], most_tokens: int) -> BadTile:
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    size = draw(st.sampled_from(bad))
    head_dim = draw(st.sampled_from(head_dims))
    return BadTile(
        fmt=Format(draw(st.sampled_from(PACKED_BITS)), draw(st.sampled_from(PACKED_BITS))),
        head_dim=head_dim,
        dtype=dtype,
        bad=size * draw(st.sampled_from((-1.0, 1.0))),
        tokens=tuple(sorted(draw(st.sets(st.integers(0, 15), min_size=1, max_size=most_tokens)))),
        dims=draw(st.sampled_from((1, 3, head_dim))),
        shaped=draw(st.booleans()),
    )


def encoded(ops, tile: BadTile, sides: tuple[torch.Tensor, torch.Tensor], device: str = "cpu") -> torch.Tensor:
    """The tile's page [1, page_bytes], with raw keys and values that came as a store brings them."""
    page = torch.full((1, tile.layout.page_bytes), 255, dtype=torch.uint8, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    shaping = None if tile.shaping is None else tile.shaping.to(device)
    ops.encode(*(side.to(device) for side in sides), zero, zero, page, tile.layout, shaping)
    return page.cpu()


def differing_tokens(tile: BadTile, page: torch.Tensor, other: torch.Tensor) -> set[tuple[int, int]]:
    """(head, token) whose codes or scales differ in two pages; all of them where a tile's anchors do."""
    codes = []
    for one in (page, other):
        key, value, scales, anchors = (
            packing.field(one, tile.layout, name)[0, :, 0] for name in tile.layout.field_offsets_bytes
        )
        key = packing.key_from_lines(packing.unpack_lines(key, tile.fmt.key_bits))
        value = packing.value_from_lines(packing.unpack_lines(value, tile.fmt.value_bits))
        codes.append(torch.cat((key, value, scales[..., None], anchors[:, None].expand(-1, 16, -1)), dim=-1))
    return {(head, token) for head, token in (codes[0] != codes[1]).any(-1).nonzero().tolist()}


def largest_of(page: torch.Tensor, tile: BadTile) -> torch.Tensor:
    """[H, 2]: the largest level that a tile's keys and values can decode to."""
    anchors = packing.field(page, tile.layout, "anchors")[0, :, 0].float()
    levels = torch.tensor([max(codec.levels(bits)) for bits in (tile.fmt.key_bits, tile.fmt.value_bits)])
    return torch.exp2((anchors - 160) / 8) * levels
