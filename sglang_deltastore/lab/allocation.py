"""Bits for each layer: the cheapest way to spend a tier's bits, given what each layer loses at each format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from deltastore_kernels.layout import PACKED_BITS, Format

from ..policy.tiers import Tier

FORMATS = tuple(Format(*bits) for bits in product(PACKED_BITS, repeat=2))


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
