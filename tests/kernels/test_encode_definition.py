"""encode against its definition in float64, one vector at a time: anchors, nibbles and codes are equal.

Shares no code with encode or packing. Where float32 and float64 may decide differently is measured
apart, with its own budget.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from deltastore_kernels import codec
from deltastore_kernels.layout import PACKED_BITS, SCALE_STEP_LOG2
from deltastore_kernels.ops.encode.reference import encode_keys, encode_values
from tests.budgets import BACKEND_SCALES_DIFFER


def nearest_codes(x: np.ndarray, divisor: float, bits: int) -> np.ndarray:
    """Index of the level nearest to x / divisor, found by looking at all of them."""
    return np.abs(x[:, None] / divisor - np.array(codec.levels(bits))).argmin(axis=1)


def unbiased_scale(x: np.ndarray, bits: int) -> float:
    rms = float(np.sqrt(np.mean(x * x)))
    levels = np.array(codec.levels(bits))[nearest_codes(x, rms, bits)]
    return float(x @ x / (x @ levels))


def anchor_of(scales: list[float]) -> int:
    return int(np.clip(np.rint(np.log2(max(scales)) * 8 + 160), 0, 255))


def nibble_of(scale: float, anchor: int) -> int:
    return int(np.clip(np.rint((codec.anchor_log2(anchor) - np.log2(scale)) / SCALE_STEP_LOG2), 0, 15))


def scale_of(nibble: int, anchor: int) -> float:
    return 2.0 ** (codec.anchor_log2(anchor) - nibble * SCALE_STEP_LOG2)


def define_keys(tile: np.ndarray, bits: int) -> tuple[np.ndarray, list[int], int]:
    """[16, D] -> codes, nibbles, anchor."""
    rms = [float(np.sqrt(np.mean(x * x))) for x in tile]
    anchor, codes, nibbles = anchor_of(rms), [], []
    for x, size in zip(tile, rms, strict=True):
        candidates = {min(max(nibble_of(size, anchor) + step, 0), 15) for step in (-1, 0, 1)}

        def error(nibble: int, x: np.ndarray = x) -> float:
            scale = scale_of(nibble, anchor)
            return float(np.sum((x - np.array(codec.levels(bits))[nearest_codes(x, scale, bits)] * scale) ** 2))

        nibbles.append(min(candidates, key=error))
        codes.append(nearest_codes(x, scale_of(nibbles[-1], anchor), bits))
    return np.array(codes), nibbles, anchor


def define_values(tile: np.ndarray, bits: int) -> tuple[np.ndarray, list[int], int]:
    """[16, D] -> codes, nibbles, anchor."""
    unbiased = [unbiased_scale(x, bits) for x in tile]
    anchor = anchor_of(unbiased)
    nibbles = [nibble_of(scale, anchor) for scale in unbiased]
    codes = [
        nearest_codes(x, float(np.sqrt(np.mean(x * x))) * scale_of(nibble, anchor) / scale, bits)
        for x, nibble, scale in zip(tile, nibbles, unbiased, strict=True)
    ]
    return np.array(codes), nibbles, anchor


@pytest.mark.parametrize(("side", "bits", "head_dim"), list(product(("key", "value"), PACKED_BITS, (32, 128))))
def test_encode_equals_its_definition(side: str, bits: int, head_dim: int) -> None:
    encode, define = (encode_keys, define_keys) if side == "key" else (encode_values, define_values)
    generator = torch.Generator().manual_seed(bits + head_dim)
    tiles = torch.randn(3, 16, head_dim, generator=generator) * torch.exp2(torch.randn(3, 16, 1, generator=generator))
    codes, nibbles, anchors = encode(tiles, bits)
    assert codes.dtype == nibbles.dtype == anchors.dtype == torch.uint8
    for i, tile in enumerate(tiles.double().numpy()):
        want_codes, want_nibbles, want_anchor = define(tile, bits)
        assert int(anchors[i]) == want_anchor
        assert nibbles[i].tolist() == want_nibbles
        assert codes[i].tolist() == want_codes.tolist()


@pytest.mark.parametrize(("side", "bits"), list(product(("key", "value"), PACKED_BITS)))
def test_scales_hardly_depend_on_the_order_of_sums(side: str, bits: int) -> None:
    encode = encode_keys if side == "key" else encode_values
    x = torch.randn(500, 16, 64, generator=torch.Generator().manual_seed(bits))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    nibbles, reordered = encode(x, bits)[1], encode(x[..., order], bits)[1]
    assert float((nibbles != reordered).float().mean()) <= BACKEND_SCALES_DIFFER
