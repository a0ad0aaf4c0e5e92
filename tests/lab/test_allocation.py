"""Bits by layer: the cheapest way to spend a tier's bits, against trying all ways."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltastore_kernels.layout import Format
from sglang_deltastore.lab.allocation import FORMATS, allocate
from sglang_deltastore.policy.tiers import TIERS

COSTS = st.lists(st.lists(st.floats(0, 1), min_size=len(FORMATS), max_size=len(FORMATS)), min_size=1, max_size=3)


@given(
    COSTS, st.lists(st.integers(1, 4), min_size=3, max_size=3), st.sampled_from(["lossless", "k4v2", "conservative"])
)
def test_no_other_choice_is_cheaper(costs: list[list[float]], heads: list[int], name: str) -> None:
    tier, heads = TIERS[name], heads[: len(costs)]
    by_format = [dict(zip(FORMATS, row, strict=True)) for row in costs]

    def bits(choice: tuple[Format, ...]) -> int:
        return sum(h * (fmt.key_bits + fmt.value_bits) for h, fmt in zip(heads, choice, strict=True))

    def cost(choice: tuple[Format, ...]) -> float:
        return sum(row[fmt] for row, fmt in zip(by_format, choice, strict=True))

    budget = bits((tier.format,) * len(heads))
    chosen = allocate(by_format, heads, tier)
    assert bits(chosen) <= budget
    cheapest = min(cost(choice) for choice in product(FORMATS, repeat=len(heads)) if bits(choice) <= budget)
    assert cost(chosen) == pytest.approx(cheapest)


def test_a_sensitive_layer_gets_the_bits() -> None:
    needy = {fmt: 8.0 - fmt.key_bits - fmt.value_bits for fmt in FORMATS}
    easy = {fmt: 0.01 * cost for fmt, cost in needy.items()}
    assert allocate([needy, easy], [1, 1], TIERS["k4v2"]) == (Format(4, 4), Format(2, 2))
