"""Peers of 2026: each quantizer against a case computed by hand or its definition, each row's bits."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deltastore_kernels.basis import fit_key_basis
from sglang_deltastore.lab import peers, recent_peers
from sglang_deltastore.policy.calibration import Calibration

RANDOM = torch.Generator().manual_seed(0)
HEADS, DIMS = 3, 64
TOKENS = torch.randn(2, HEADS, 150, DIMS, generator=RANDOM) * torch.linspace(0.2, 3, DIMS)
QUERIES = torch.randn(HEADS, 500, DIMS, generator=RANDOM) @ torch.randn(HEADS, DIMS, DIMS, generator=RANDOM)
MOMENTS = QUERIES.mT @ QUERIES


def calibration() -> Calibration:
    keys = TOKENS.transpose(0, 1).flatten(1, 2)
    return Calibration("", (fit_key_basis(keys.mean(1), keys.mT @ keys, MOMENTS),), {})


ALL = recent_peers.methods(calibration())


def relative_error(decoded: torch.Tensor, original: torch.Tensor) -> float:
    return float((decoded - original).square().sum() / original.square().sum())


@pytest.mark.parametrize("tokens", [1, 33, 150])
@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_every_peer_keeps_shape_and_most_of_the_signal(method: peers.Method, tokens: int) -> None:
    key, value = TOKENS[:, :, :tokens], TOKENS[:, :, -tokens:]
    for got, original in zip(method.apply(0, key, value), (key, value), strict=True):
        assert got.shape == original.shape
        assert got.dtype == torch.float32
        assert relative_error(got, original) < 0.35
    assert method.source == "peer"


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_zeros_stay_zeros(method: peers.Method) -> None:
    zeros = torch.zeros(1, HEADS, 20, DIMS)
    for got in method.apply(0, zeros, zeros):
        assert not got.abs().max() > 1e-4  # KVarN divides by no less than 0.001


def test_names_are_unique() -> None:
    names = [method.name for method in (*ALL, *peers.methods(layers=30))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [
        ("TCQ (buun-llama-cpp), 2 bits", 64, 2.25),
        ("TCQ (buun-llama-cpp), 3 bits", 128, 3.125),
        ("TCQ (buun-llama-cpp), 3 bits", 256, 3.125),  # two groups a head
        ("NexusQuant E8 K3V2", 64, (26 / 8 + 18 / 8) / 2 + 0.25),
        # bytes of 128 tokens: codes, two float16 a channel (keys) or token (values), one for the other side
        ("KVarN K4V2 g128", 128, (128 * 128 * 6 + 2 * 128 * 3 * 16) / (2 * 128 * 128)),
        ("KVarN K4V2 g128", 64, (128 * 64 * 6 + (64 * 2 + 128 + 128 * 2 + 64) * 16) / (2 * 128 * 64)),
        ("LBQ K4V2 (Lifeboat)", 64, 3 + 0.25 + 16 / 256 / 2),
        ("OSCAR INT2", 128, 2.25),
    ],
)
def test_bits(name: str, head_dim: int, bits: float) -> None:
    (method,) = [method for method in ALL if method.name == name]
    assert method.bits_per_value(head_dim) == pytest.approx(bits)


def test_e8_takes_the_nearest_of_all_its_points() -> None:
    """Of the points within reach of the largest channel, whose size sets the scale."""
    whole = torch.tensor([p for p in product((-1.0, 0, 1), repeat=8) if sum(p) % 2 == 0])
    halves = torch.tensor(list(product((-0.5, 0.5), repeat=8)))
    points = torch.cat((whole, halves))
    x = torch.randn(200, 8, generator=RANDOM)
    x = x / x.abs().amax(-1, keepdim=True)
    decoded = recent_peers.relaxed_e8(x, reach=1)
    nearest = torch.cdist(x, points).amin(-1)
    torch.testing.assert_close((decoded - x).norm(dim=-1), nearest, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("reach", "bits"), [(2, 18), (4, 26)])
def test_e8s_points_have_numbers_of_so_many_bits(reach: int, bits: int) -> None:
    evens = ((2 * reach + 1) ** 8 + 1) // 2  # of whole coordinates, the even sums are one more than the odd ones
    assert 2 ** (bits - 1) < evens + (2 * reach) ** 8 <= 2**bits


def test_a_tile_of_outer_product_is_balanced_at_once() -> None:
    rows, columns = torch.rand(40, 1, generator=RANDOM) * 9 + 1, torch.rand(1, 64, generator=RANDOM) * 9 + 1
    signs = torch.randint(0, 2, (40, 64), generator=RANDOM) * 2.0 - 1
    tile = rows * columns * signs
    assert relative_error(recent_peers.balanced(tile, 2), tile) < 0.01  # signs of a row are not quite half and half
    assert relative_error(peers.minmax(tile, 2), tile) > 0.05


def test_kvarn_scales_keys_by_channel_and_values_by_token() -> None:
    """A constant channel costs no error where each channel has a range of its own."""
    turn = peers.hadamard(DIMS)
    rotated = torch.randn(1, 1, 128, DIMS, generator=RANDOM)
    rotated[..., 5] = 30
    method = recent_peers.kvarn(2, 2)
    key, value = (decoded @ turn for decoded in method.apply(0, rotated @ turn.T, rotated @ turn.T))
    others = [channel for channel in range(DIMS) if channel != 5]
    errors = [relative_error(side[..., others], rotated[..., others]) for side in (key, value)]
    assert errors[0] < errors[1]


def test_lbq_removes_each_chunks_mean_from_keys_alone() -> None:
    shifted = TOKENS.repeat(1, 1, 2, 1)[:, :, :300] + 20 * torch.randn(DIMS, generator=RANDOM)
    key, value = recent_peers.lbq(2, 2).apply(0, shifted, shifted)
    centred = shifted - shifted[:, :, :256].mean(2, keepdim=True)
    assert float((key - shifted).square().sum() / centred.square().sum()) < 0.2
    assert float((value - shifted).square().sum() / centred.square().sum()) > 1


def test_oscar_turns_keys_by_what_queries_look_at() -> None:
    found = recent_peers.query_moments(calibration().layers[0])
    # up to each head's size and the floor that calibration adds, 1%
    sized = [moment / moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for moment in (found, MOMENTS)]
    assert float((sized[0] - sized[1]).norm() / sized[1].norm()) < 0.05


def test_tcq_errs_less_than_lloyd_and_max() -> None:
    x = torch.randn(1, 1, 400, 128, generator=RANDOM)
    for bits, lloyd_max in ((2, 0.1175), (3, 0.03454)):
        assert relative_error(recent_peers.tcq(bits).apply(0, x, x)[0], x) < 0.78 * lloyd_max
