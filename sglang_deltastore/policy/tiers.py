"""Tiers: named choices of a format for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltastore_kernels.layout import HEAD_DIMS, RAW, Format, PageLayout


@dataclass(frozen=True)
class Tier:
    """A named choice of formats: one for all layers; with calibration another of as many bytes where `calibrated` names
    one, or as many bits dealt out over the layers by what each of them loses. `levels`: names of the tiers of which its
    pages are, finest first, where they may be of more than one; `format` is the finest then."""

    name: str
    summary: str
    format: Format
    calibrated: Format | None = None
    levels: tuple[str, ...] = ()

    def layouts(
        self,
        heads_by_layer: list[int],
        head_dim: int,
        page_tokens: int,
        formats: Sequence[Format] | None = None,
        head_dims: Sequence[int] = HEAD_DIMS,
    ) -> list[PageLayout]:
        """One page layout for each layer of a model whose heads are all of one size, given its number of KV heads;
        `formats`: each layer's own; head_dims: those that may be stored."""
        formats = formats or [self.format] * len(heads_by_layer)
        return [
            PageLayout.holding(fmt, heads, head_dim, head_dim, page_tokens, head_dims)
            for fmt, heads in zip(formats, heads_by_layer, strict=True)
        ]


def describe(formats: Sequence[Format]) -> str:
    """ "K4V3" where all layers share a format, else the mean bits: "K3.4V2.6 by layer"."""
    if len(set(formats)) == 1:
        return str(formats[0])
    key_bits, value_bits = (
        sum(getattr(fmt, side) for fmt in formats) / len(formats) for side in ("key_bits", "value_bits")
    )
    return f"K{key_bits:.1f}V{value_bits:.1f} by layer"


_TIERS = (
    Tier("raw", "16-bit pages: ratio 1, shows what the attention path alone brings", RAW),
    Tier("lossless", "4-bit keys, 3-bit values: the closest to 16 bits", Format(4, 3)),
    # Calibrated keys of 3 bits lose less than values of 2 (kernels/DECISIONS.md: "Six bits are three and three").
    Tier("k4v2", "4-bit keys, 2-bit values; 3 and 3 bits where keys are calibrated", Format(4, 2), Format(3, 3)),
    Tier("conservative", "3-bit keys, 2-bit values: the smallest that loses little", Format(3, 2)),
    Tier("k2v2", "2-bit keys, 2-bit values: loses four times as much, a token here and there entirely", Format(2, 2)),
)
TIERS: dict[str, Tier] = {tier.name: tier for tier in _TIERS}
"""Those whose pages are all alike."""

ADAPTIVE = Tier(
    "adaptive",
    "lossless while there is room, then conservative where it was used longest ago: all that fits as conservative",
    TIERS["lossless"].format,
    levels=("lossless", "conservative"),
)
SERVED_TIERS = TIERS | {ADAPTIVE.name: ADAPTIVE}
"""A server's."""

DEFAULT_TIER = "lossless"


def tier(name: str, known: Mapping[str, Tier] = TIERS) -> Tier:
    """The tier of that name. Raises ValueError naming the known ones."""
    if name not in known:
        raise ValueError(f"--kv-compress-tier {name}: unknown tier; known are {', '.join(known)}")
    return known[name]
