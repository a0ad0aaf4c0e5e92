"""Bits for each layer: the cheapest way to spend so many bits, given what each layer loses at each format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from deltastore_kernels.layout import PACKED_BITS, Format

FORMATS = tuple(Format(*bits) for bits in product(PACKED_BITS, repeat=2))


def allocate(costs: Sequence[dict[Format, float]], heads: Sequence[int], mean_bits: float) -> tuple[Format, ...]:
    """The formats of least total cost whose bits, a key's and a value's together, are `mean_bits` at most
    over all layers. Raises ValueError for fewer than any format takes.

    Costs add up over layers (a first-order view: each is small). Exact, by dynamic programming over the bits spent;
    heads: KV heads of each layer, which weigh its bits.
    """
    if mean_bits < min(fmt.key_bits + fmt.value_bits for fmt in FORMATS):
        raise ValueError(f"{mean_bits} bits for a key's and a value's numbers: allowed are at least 4, 2 for each")
    budget = sum(heads) * mean_bits
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
