"""Tiers: named choices of a format for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from deltastore_kernels.layout import RAW, Format, PageLayout


@dataclass(frozen=True)
class Tier:
    """A named choice of formats. All layers share one format so far; a page knows its layout, so
    that later tiers may differ from layer to layer."""

    name: str
    summary: str
    format: Format

    def layouts(self, heads_by_layer: list[int], head_dim: int, page_tokens: int) -> list[PageLayout]:
        """One page layout for each layer, given its number of KV heads."""
        return [PageLayout(self.format, heads, head_dim, page_tokens) for heads in heads_by_layer]


_TIERS = (
    Tier("raw", "16-bit pages: ratio 1, shows what the attention path alone brings", RAW),
    Tier("lossless", "4-bit keys, 3-bit values: the closest to 16 bits", Format(4, 3)),
    Tier("k4v2", "4-bit keys, 2-bit values", Format(4, 2)),
    Tier("conservative", "3-bit keys, 2-bit values: the smallest", Format(3, 2)),
)
TIERS: dict[str, Tier] = {tier.name: tier for tier in _TIERS}
DEFAULT_TIER = "lossless"


def tier(name: str) -> Tier:
    """The tier of that name. Raises ValueError naming the known ones."""
    if name not in TIERS:
        raise ValueError(f"--kv-compress-tier {name}: unknown tier; known are {', '.join(TIERS)}")
    return TIERS[name]
