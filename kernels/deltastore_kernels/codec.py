"""The numbers of the codec: levels of the scalar codebooks and the scales' logarithmic grid.

Values are expected to be Gaussian after the rotation, so the codebooks are Lloyd-Max quantizers of
a unit Gaussian (J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6(1), 1960,
table I), rounded to int8 so that a kernel may take integer dot products:

    x ~= LEVELS_INT8[bits][code] * LEVEL_UNIT[bits] * scale         scale in units of x's own RMS

Codes are sorted by level, so a code's leading bits are a coarser code of the same cell.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

from .layout import ANCHOR_BIAS, ANCHORS_PER_OCTAVE, SCALE_NIBBLES, SCALE_STEP_LOG2

#: positive levels of each codebook times 1 / LEVEL_UNIT; tests derive them anew
_POSITIVE_LEVELS = {
    2: (38, 127),
    3: (14, 45, 79, 127),
    4: (6, 18, 31, 44, 58, 75, 96, 127),
}
#: bits -> all levels, ascending; the code is the index
LEVELS_INT8: dict[int, tuple[int, ...]] = {
    bits: tuple(-level for level in reversed(levels)) + levels for bits, levels in _POSITIVE_LEVELS.items()
}
#: the largest Lloyd-Max level is 127 units
LEVEL_UNIT: dict[int, float] = {2: 1.5104 / 127, 3: 2.1520 / 127, 4: 2.7326 / 127}
#: A token of at least this scale, and over so many times the scale of half of its tile's tokens, is *huge*: the tile's
#: anchor disregards it (ops/encode/reference.py). One number that overflowed float16 makes its token huge at every
#: head_dim; models are far from it (DECISIONS.md).
HUGE_SCALE = 256.0
HUGE_RATIO = 128.0
#: half level units beyond which the code no longer changes
HALVES_MAX = 2 * 127


def levels(bits: int) -> list[float]:
    """Reconstruction levels for a unit Gaussian, ascending."""
    return [level * LEVEL_UNIT[bits] for level in LEVELS_INT8[bits]]


def boundaries(bits: int) -> list[float]:
    """Decision boundaries between neighbouring levels: `2**bits - 1` midpoints."""
    grid = levels(bits)
    return [(low + high) / 2 for low, high in pairwise(grid)]


def codes_of_halves(bits: int) -> list[int]:
    """Code of each whole number of half level units, from -HALVES_MAX to HALVES_MAX.

    A boundary is the sum of two int8 levels in half units, a whole number: rounding a vector up to
    whole halves puts it on the right side of every boundary, ties below.
    """
    grid = LEVELS_INT8[bits]
    edges = [low + high for low, high in pairwise(grid)]
    return [bisect_left(edges, half) for half in range(-HALVES_MAX, HALVES_MAX + 1)]


def anchor_log2(anchor: int) -> float:
    """log2 of the largest scale of a tile, from its anchor byte."""
    return (anchor - ANCHOR_BIAS) / ANCHORS_PER_OCTAVE


def nibble_factors() -> list[float]:
    """scale / largest scale of the tile, for each scale nibble."""
    return [2.0 ** (-nibble * SCALE_STEP_LOG2) for nibble in range(SCALE_NIBBLES)]
