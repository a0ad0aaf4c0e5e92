"""Bits by layer: the cheapest way to spend a tier's bits, against trying all ways."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltastore_kernels.layout import Format
from sglang_deltastore.policy.allocation import FORMATS, Needs, allocate, deal
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


def needs(context_tokens: int, keys: list[float], values: list[float]) -> Needs:
    return Needs(context_tokens, tuple(keys), tuple(values))


def test_bits_go_where_values_or_keys_need_them_at_every_length() -> None:
    """Values of layer 0 are dear behind a short context, keys of layer 1 behind a long one."""
    found = deal(needs(480, [0.1, 0.1, 0.1], [20, 0.1, 0.1]), needs(4064, [0.1, 20, 0.1], [0.1, 0.1, 0.1]), [1, 1, 1])
    first, second, third = found["conservative"]
    assert first.value_bits > third.value_bits and second.key_bits > third.key_bits
    assert sum(fmt.key_bits + fmt.value_bits for fmt in found["conservative"]) == 3 * 5
    assert "lossless" not in found, "its keys have four bits already: nothing makes the long context better"


@given(st.lists(st.tuples(*[st.floats(1e-6, 1)] * 4), min_size=1, max_size=4))
def test_no_dealing_loses_more_than_one_format_at_any_length(losses: list[tuple[float, ...]]) -> None:
    short, long = (needs(at, [row[i] for row in losses], [row[i + 1] for row in losses]) for at, i in ((1, 0), (2, 2)))
    for name, formats in deal(short, long, [2] * len(losses)).items():
        uniform = (TIERS[name].format,) * len(losses)
        for each in (short, long):
            assert each.total(formats) < each.total(uniform)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1.0])
def test_needs_that_cannot_be_deal_nothing(odd: float) -> None:
    sound = needs(480, [1, 1], [1, 1])
    assert deal(needs(480, [odd, 1], [1, 1]), sound, [1, 1]) == {}
    assert deal(sound, needs(480, [0, 0], [0, 0]), [1, 1]) == {}
