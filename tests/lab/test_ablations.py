"""Ablations: each method against its definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from deltastore_kernels import codec
from deltastore_kernels.ops.decode.reference import levels_of
from deltastore_kernels.ops.encode.reference import encode_keys, encode_values
from sglang_deltastore.lab import ablations, peers, published

RANDOM = torch.Generator().manual_seed(0)
KEY = torch.randn(2, 3, 36, 64, generator=RANDOM) + 2 * torch.randn(64, generator=RANDOM)
VALUE = torch.randn(2, 3, 36, 64, generator=RANDOM)


def relative_rms(decoded: torch.Tensor, original: torch.Tensor) -> float:
    return float((decoded - original).norm() / original.norm())


@pytest.mark.parametrize("tokens", [1, 3, 5, 36])
@pytest.mark.parametrize("method", ablations.methods(), ids=lambda method: method.name)
def test_every_method_keeps_the_shape(method: peers.Method, tokens: int) -> None:
    key, value = method.apply(0, KEY[:, :, :tokens], VALUE[:, :, :tokens])
    assert key.shape == (2, 3, tokens, 64) == value.shape
    assert key.isfinite().all()
    assert value.isfinite().all()


def test_names_are_unique_and_claims_belong_to_rows() -> None:
    names = [method.name for method in ablations.methods()]
    assert len(set(names)) == len(names)
    assert set(ablations.CLAIMED) <= set(names)


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (ablations.LowRank(32), (32 * 4 + 16) / 64),
        (ablations.VectorQuantization(8), 1),
        (ablations.VectorQuantization(2), 4),
        (ablations.CrossLayerDelta(published.absmax(4, 2)), 3.25),
        (ablations.per_channel(4, 4, 32), 5),
        (ablations.per_channel(4, 2, 64), 3.5),
        (ablations.asymmetric_rotated(4, 2), 3.5),
        (ablations.three_bit_keys(False), (3.25 + 16) / 2),
        (ablations.Steps("nibble scales", scales="nibble"), 3 + 4.5 / 64),
        (ablations.Steps("8-bit scales", scales="8-bit"), 3 + 8 / 64),
        (ablations.Steps("fp16 scales", scales="fp16"), 3 + 16 / 64),
        (ablations.Steps("uniform levels", lloyd_max=False), 3 + 16 / 64),
    ],
    ids=lambda given: getattr(given, "name", None),
)
def test_bits(method: peers.Method, bits: float) -> None:
    assert method.bits_per_value(64) == pytest.approx(bits)


# --- negative results ---


def test_low_rank_is_exact_up_to_its_factors_bits_where_the_rank_suffices() -> None:
    x = torch.randn(1, 1, 50, 4, generator=RANDOM) @ torch.randn(4, 64, generator=RANDOM)
    assert relative_rms(ablations.LowRank(4, bits=8).apply(0, x, x)[0], x) < 0.02
    assert relative_rms(ablations.LowRank(2, bits=8).apply(0, x, x)[0], x) > 0.2


def test_deltas_add_up_over_layers() -> None:
    method = ablations.CrossLayerDelta(published.absmax(8, 8))
    layers = [(KEY * (1 + 0.1 * layer), VALUE - layer) for layer in range(4)]
    for layer, (key, value) in enumerate(layers):
        decoded = method.apply(layer, key, value)
        assert relative_rms(decoded[0], key) < 0.01
        assert relative_rms(decoded[1], value) < 0.01


def test_a_delta_is_what_is_quantized() -> None:
    method = ablations.CrossLayerDelta(published.absmax(4, 2))
    below, _ = method.apply(0, KEY, VALUE)
    same, _ = method.apply(1, below, VALUE)
    assert torch.equal(same, below)


def test_deltas_of_skipped_layers_or_other_tokens_are_refused() -> None:
    method = ablations.CrossLayerDelta(published.absmax(4, 2))
    with pytest.raises(ValueError, match="layer 1 must follow layer 0"):
        method.apply(1, KEY, VALUE)
    method.apply(0, KEY, VALUE)
    with pytest.raises(ValueError, match="layer 2 must follow layer 1"):
        method.apply(2, KEY, VALUE)
    with pytest.raises(ValueError, match="of the same tokens"):
        method.apply(1, KEY[:, :, 1:], VALUE[:, :, 1:])


@pytest.mark.parametrize("block", [2, 4, 8])
def test_vector_quantization_has_at_most_256_blocks(block: int) -> None:
    key, _ = ablations.VectorQuantization(block).apply(0, KEY, VALUE)
    assert len(key.reshape(-1, block).unique(dim=0)) <= 256
    assert 0.02 < relative_rms(key, KEY) < 0.6


def test_kmeans_finds_separated_clusters() -> None:
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=RANDOM)).flatten(0, 1)
    shuffled = points[torch.randperm(150, generator=torch.Generator().manual_seed(1))]
    # the first three are of three clusters
    found = ablations.kmeans(torch.cat((points[::50], shuffled)), 3, rounds=5)
    torch.testing.assert_close(found, centres, rtol=0, atol=0.1)


def test_nearest_counts_the_centroids_length() -> None:
    # by inner product alone the longer one would win
    assert ablations.nearest(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0], [5, 0]])).tolist() == [0]


def test_per_channel_groups_span_tokens() -> None:
    _, value = ablations.per_channel(4, 2, 32).apply(0, KEY, VALUE)
    assert all(len(channel.unique()) <= 4 for channel in value[0, 0, :32].T)


def test_rotation_is_what_three_bit_keys_need() -> None:
    outliers = KEY.clone()
    outliers[..., 3] = 200
    others = [channel for channel in range(64) if channel != 3]
    plain, rotated = (ablations.three_bit_keys(rotated).apply(0, outliers, VALUE) for rotated in (False, True))
    assert torch.equal(plain[1], VALUE)
    assert not plain[0][..., others].any()  # all codes are 0 beside such a channel
    assert rotated[0][..., others].any()


# --- the steps of our codec ---


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_all_steps_are_what_the_packed_store_decodes(bits: int) -> None:
    """Tokens 4 .. 35 are two whole tiles. Sums in another order decide a few near ties the other way."""
    key, value = ablations.Steps("", bits, bits).apply(0, KEY, VALUE)
    rotation = peers.hadamard(64)
    mean = KEY[:, :, 4:].mean(2, keepdim=True)
    for decoded, packed, encode in ((key, KEY - mean, encode_keys), (value, VALUE, encode_values)):
        tiles = (packed[:, :, 4:] @ rotation).unflatten(2, (2, 16))
        codes, nibbles, anchors = encode(tiles, bits)
        scale = torch.exp2((anchors.float() - 160) / 8)[..., None] * torch.tensor(codec.nibble_factors())[nibbles.int()]
        stored = (levels_of(codes, bits) * scale[..., None]).flatten(2, 3) @ rotation.T
        ours = decoded[:, :, 4:] - (mean if encode is encode_keys else 0)
        assert relative_rms(ours, stored) < 0.01


def test_raw_sinks() -> None:
    key, value = ablations.Steps("", sink_tokens=4).apply(0, KEY, VALUE)
    assert torch.equal(key[:, :, :4], KEY[:, :, :4])
    assert torch.equal(value[:, :, :4], VALUE[:, :, :4])
    assert not torch.isclose(key[:, :, 4], KEY[:, :, 4]).all()
    key, _ = ablations.Steps("", sink_tokens=0).apply(0, KEY, VALUE)
    assert not torch.isclose(key[:, :, 0], KEY[:, :, 0]).all()


@pytest.mark.parametrize("scales", ["fp16", "8-bit", "nibble"])
def test_unbiased_values_keep_their_length_along_themselves(scales: str) -> None:
    def along(unbiased: bool) -> float:
        _, decoded = ablations.Steps("", unbiased=unbiased, scales=scales, sink_tokens=0).apply(0, KEY, VALUE)
        return float(((decoded * VALUE).sum(-1) / VALUE.square().sum(-1)).mean())

    assert along(True) == pytest.approx(1, abs=0.02)
    assert along(False) < 0.93  # short by the distortion, 0.1175


def test_key_means_help_keys_that_have_one() -> None:
    errors = [
        relative_rms(ablations.Steps("", key_means=means, sink_tokens=0).apply(0, KEY, VALUE)[0], KEY)
        for means in (True, False)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_scale_grids() -> None:
    scale = torch.rand(40, 1, generator=RANDOM) * 0.9 + 0.1
    assert len(ablations.round_scales(scale, "nibble")[:16].unique()) <= 16
    for kind, worst in (("fp16", 2**-11), ("8-bit", 2 ** (1 / 16) - 1), ("nibble", 2 ** (3 / 16 + 1 / 16) - 1)):
        error = (ablations.round_scales(scale, kind) / scale - 1).abs().max()
        assert worst / 3 < error <= worst * 1.001
    smaller = ablations.round_scales(scale, "nibble", -1) / ablations.round_scales(scale, "nibble")
    assert smaller.max() <= 1.0001
    assert float(smaller.min()) == pytest.approx(2**-0.375, rel=1e-4)
    larger = ablations.round_scales(scale, "8-bit", 1) / ablations.round_scales(scale, "8-bit")
    torch.testing.assert_close(larger, torch.full_like(larger, 2 ** (1 / 8)))


def test_steps_are_added_one_at_a_time() -> None:
    rows = ablations.steps()
    switches = ("rotated", "lloyd_max", "unbiased", "key_means", "sink_tokens", "scales")
    for before, after in pairwise(rows[:8]):
        assert sum(getattr(before, name) != getattr(after, name) for name in switches) == 1
    whole = ablations.Steps("")
    assert all(getattr(rows[7], name) == getattr(whole, name) for name in switches)
    for row in rows[8:]:
        assert sum(getattr(row, name) != getattr(whole, name) for name in switches) == 1
