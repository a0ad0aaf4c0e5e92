"""codec.py: the codebooks derived anew from the Gaussian density, and the grid of scales."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from deltastore_kernels import codec
from deltastore_kernels.layout import PACKED_BITS, SCALE_NIBBLES, SCALE_STEP_LOG2
from tests.budgets import FORMAT_DISTORTION, FORMAT_DISTORTION_DEVIATION, FORMAT_LEVEL_ROUNDING


def lloyd_max(bits: int, rounds: int = 3000) -> list[float]:
    """Lloyd's iteration on the unit Gaussian: each level becomes the mean of its cell."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    count = 2**bits
    grid = [4 * (index + 0.5) / count - 2 for index in range(count)]
    for _ in range(rounds):
        edges = [-math.inf, *((low + high) / 2 for low, high in pairwise(grid)), math.inf]
        grid = [(density(low) - density(high)) / (below(high) - below(low)) for low, high in pairwise(edges)]
    return grid


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_levels_are_lloyd_max(bits: int) -> None:
    unit = codec.LEVEL_UNIT[bits]
    for got, want in zip(codec.levels(bits), lloyd_max(bits), strict=True):
        assert abs(got - want) <= FORMAT_LEVEL_ROUNDING * unit


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_levels_are_ascending_symmetric_int8(bits: int) -> None:
    levels = codec.LEVELS_INT8[bits]
    assert len(levels) == 2**bits
    assert list(levels) == sorted(set(levels)) == [-level for level in reversed(levels)]
    assert max(levels) == 127


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_distortion_on_a_gaussian(bits: int) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    edges = torch.tensor(codec.boundaries(bits), dtype=torch.float64)
    decoded = torch.tensor(codec.levels(bits), dtype=torch.float64)[torch.bucketize(x, edges)]
    distortion = float((decoded - x).square().mean())
    assert distortion == pytest.approx(FORMAT_DISTORTION[bits], rel=FORMAT_DISTORTION_DEVIATION)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_boundaries_are_midpoints(bits: int) -> None:
    levels, boundaries = codec.levels(bits), codec.boundaries(bits)
    assert len(boundaries) == 2**bits - 1
    assert boundaries[2 ** (bits - 1) - 1] == 0
    for boundary, (low, high) in zip(boundaries, pairwise(levels), strict=True):
        assert boundary - low == pytest.approx(high - boundary)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_codes_of_halves_count_the_boundaries_below(bits: int) -> None:
    table, unit = codec.codes_of_halves(bits), codec.LEVEL_UNIT[bits]
    assert len(table) == 2 * codec.HALVES_MAX + 1
    for index, code in enumerate(table):
        below = (index - codec.HALVES_MAX - 0.5) * unit / 2  # a value that rounds up to this half
        assert code == sum(below > boundary for boundary in codec.boundaries(bits))
    assert (table[0], table[-1]) == (0, 2**bits - 1)


def test_coarser_codes_are_leading_bits_of_the_same_cells() -> None:
    """Both levels under a 3-bit code's leading two bits lie on one side of every kept boundary."""
    fine, coarse_edges = codec.levels(3), codec.boundaries(3)[1::2]
    for code, level in enumerate(fine):
        assert sum(level > edge for edge in coarse_edges) == code >> 1


def test_nibbles_are_equal_steps_down_from_the_anchor() -> None:
    factors = codec.nibble_factors()
    assert len(factors) == SCALE_NIBBLES == 16
    assert factors[0] == 1
    for high, low in pairwise(factors):
        assert math.log2(high / low) == pytest.approx(SCALE_STEP_LOG2)


def test_anchors_are_eighths_of_an_octave_around_one() -> None:
    assert codec.anchor_log2(160) == 0
    assert codec.anchor_log2(161) - codec.anchor_log2(160) == pytest.approx(1 / 8)
    assert codec.anchor_log2(0) == -20
    assert codec.anchor_log2(255) == pytest.approx(11.875)
