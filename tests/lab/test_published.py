"""The published quantizer: rotation, then absmax-symmetric codes in groups of 64."""

from __future__ import annotations

import pytest
import torch

from sglang_deltastore.lab import peers, published

X = torch.randn(1, 2, 21, 64, generator=torch.Generator().manual_seed(0))


def test_the_row() -> None:
    method = published.absmax(4, 2)
    assert (method.name, method.source) == ("absmax K4V2 g64", "published")


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "head_dim", "bits"),
    [(4, 4, 64, 4.25), (4, 2, 64, 3.25), (4, 2, 128, 3.25), (4, 2, 32, 3.5)],
)
def test_bits_count_the_scales(key_bits: int, value_bits: int, head_dim: int, bits: float) -> None:
    assert published.absmax(key_bits, value_bits).bits_per_value(head_dim) == bits


def test_codes_live_in_the_rotated_basis() -> None:
    key, value = published.absmax(4, 2).apply(0, X, X)
    for decoded, levels in ((key, 15), (value, 3)):
        for token in (decoded @ peers.hadamard(64)).flatten(0, 2):
            scale = token.abs().max()
            assert len((token / scale).mul(100).round().unique()) <= levels
        assert len((X[0, 0, 0] - decoded[0, 0, 0]).unique()) == 64


def test_two_bit_values_are_three_levels_of_the_largest() -> None:
    _, value = published.absmax(4, 2).apply(0, X, X)
    rotated, decoded = X @ peers.hadamard(64), value @ peers.hadamard(64)
    largest = rotated.abs().amax(-1, keepdim=True)
    expected = torch.where(rotated.abs() > largest / 2, rotated.sign() * largest, 0.0)
    torch.testing.assert_close(decoded, expected, rtol=1e-3, atol=1e-3)


def test_a_head_of_128_has_two_groups() -> None:
    x = torch.cat((X, 9 * X), -1)
    small = published.absmax(4, 4, group=64).apply(0, x, x)[0]
    large = published.absmax(4, 4, group=128).apply(0, x, x)[0]
    assert (small - x).norm() < (large - x).norm()
