"""Bits for each layer: the cheapest way to spend a tier's bits, given what each layer loses at each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from deltastore_kernels.layout import PACKED_BITS, Format

from .tiers import TIERS, Tier

FORMATS = tuple(Format(*bits) for bits in product(PACKED_BITS, repeat=2))
PROBED = Format(3, 2)
"""The format at which a layer's needs are probed: coarse enough to be seen, fine enough to be like the others."""

ERROR = {2: 0.117, 3: 0.0345, 4: 0.0095}
"""Mean square error of a normal number in the best code of so many bits (Max, 1960, table I)."""


SHORT_SHARES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Weights of what is lost behind a short context that are tried, the rest being the long one's."""


@dataclass(frozen=True)
class Needs:
    """What the model's last hidden states lose, relative to their square, when one layer's stored keys, or values, are
    those of PROBED: one entry for each layer. `context_tokens` were stored before the tokens that were looked at."""

    context_tokens: int
    keys: tuple[float, ...]
    values: tuple[float, ...]

    def cost(self, layer: int, fmt: Format) -> float:
        """Losses go with the square of the stored numbers' errors (a first-order view: each is small)."""
        key = self.keys[layer] * ERROR[fmt.key_bits] / ERROR[PROBED.key_bits]
        return key + self.values[layer] * ERROR[fmt.value_bits] / ERROR[PROBED.value_bits]

    def total(self, formats: Sequence[Format]) -> float:
        return sum(self.cost(layer, fmt) for layer, fmt in enumerate(formats))


def deal(short: Needs, long: Needs, heads: Sequence[int]) -> dict[str, tuple[Format, ...]]:
    """Each packed tier's formats by layer, from its needs behind a short and behind a long context. The worse of the
    two lengths decides; where no dealing loses less than the tier's one format at both, the tier is not among the
    keys."""
    dealt: dict[str, tuple[Format, ...]] = {}
    if not (_is_sound(short) and _is_sound(long)):
        return dealt
    for tier in TIERS.values():
        if tier.format.is_raw:
            continue
        uniform = (tier.format,) * len(heads)
        units = (short.total(uniform), long.total(uniform))

        def losses(formats: Sequence[Format], units: tuple[float, float] = units) -> tuple[float, float]:
            return short.total(formats) / units[0], long.total(formats) / units[1]

        tried = (
            allocate(
                [
                    {
                        fmt: share * short.cost(layer, fmt) / units[0] + (1 - share) * long.cost(layer, fmt) / units[1]
                        for fmt in FORMATS
                    }
                    for layer in range(len(heads))
                ],
                heads,
                tier,
            )
            for share in SHORT_SHARES
        )
        best = min(tried, key=lambda formats: max(losses(formats)))
        if max(losses(best)) < 1:
            dealt[tier.name] = best
    return dealt


def _is_sound(needs: Needs) -> bool:
    found = torch.tensor([needs.keys, needs.values])
    return bool(found.isfinite().all() and (found >= 0).all() and found.sum() > 0)


def allocate(costs: Sequence[dict[Format, float]], heads: Sequence[int], tier: Tier) -> tuple[Format, ...]:
    """The formats of least total cost that take no more bits over all layers than `tier` does.

    Costs add up over layers (a first-order view: each is small). Exact, by dynamic programming over the bits spent;
    heads: KV heads of each layer, which weigh its bits.
    """
    budget = sum(heads) * (tier.format.key_bits + tier.format.value_bits)
    best: dict[int, tuple[float, tuple[Format, ...]]] = {0: (0.0, ())}
    for layer_costs_, layer_heads in zip(costs, heads, strict=True):
        grown: dict[int, tuple[float, tuple[Format, ...]]] = {}
        for (spent, (total, chosen)), fmt in product(best.items(), FORMATS):
            bits = spent + layer_heads * (fmt.key_bits + fmt.value_bits)
            cost = total + layer_costs_[fmt]
            if bits <= budget and (bits not in grown or cost < grown[bits][0]):
                grown[bits] = (cost, (*chosen, fmt))
        best = grown
    return min(best.values(), key=lambda found: found[0])[1]
