"""Peers: each quantizer against a case computed by hand, each format's bits against what it holds."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.lab import peers

ALL = peers.methods(layers=30) + peers.methods(residual=True)[:2]
RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randn(2, 3, 77, 64, generator=RANDOM) * torch.linspace(0.2, 3, 64)


def relative_rms(decoded: torch.Tensor, original: torch.Tensor) -> float:
    return float((decoded - original).norm() / original.norm())


# --- one group, by hand ---


@pytest.mark.parametrize(
    ("quantize", "given_values", "expected"),
    [
        # scale 7 / 7 = 1
        (partial(peers.absmax, bits=4), [7.0, -2.6, 0.4, 1.5], [7, -3, 0, 2]),
        # one bit and a sign: scale 4, levels -4, 0, 4
        (partial(peers.absmax, bits=2), [4.0, -2.1, 1.9, -4.0], [4, -4, 0, -4]),
        # least 1, scale (7 - 1) / 3 = 2
        (partial(peers.minmax, bits=2), [1.0, 7.0, 3.9, 4.1], [1, 7, 3, 5]),
        # the range is stretched to 0: scale 0.95 * 30 / 15 = 1.9, zero point 0; 30 is clipped to 28.5
        (partial(peers.minmax_zero_point, bits=4, clip=0.95), [30.0, 10.0, 1.9, 3.0], [28.5, 9.5, 1.9, 3.8]),
        # scale 30 / 15 = 2, zero point 5: codes 0 .. 15 are -10 .. 20
        (partial(peers.minmax_zero_point, bits=4, clip=1.0), [-10.0, 20.0, 0.9, 1.1], [-10, 20, 0, 2]),
        # norm 5, unit vector 0.6, -0.8: levels 0.5 and -0.5
        (partial(peers.unit_codebook, levels=torch.tensor([-0.5, 0.5])), [3.0, -4.0], [2.5, -2.5]),
        (
            partial(peers.unit_codebook, levels=torch.tensor([-0.5, 0.5]), renormalize=True),
            [3.0, -4.0],
            [5 / math.sqrt(2), -5 / math.sqrt(2)],
        ),
        # 3 bits of mantissa: steps of 2 between 16 and 32, of 1/16 between 1/2 and 1; saturates
        (peers.e4m3, [17.1, 0.6, -500.0, 0.0], [18, 0.625, -448, 0]),
        # scale: 6 / 6 is 1 in e4m3 under the tensor's
        (peers.nvfp4, [6.0, 2.4, 2.6, -5.1], [6, 2, 3, -6]),
        # OCP: log2(7 / 4) = 0.8 goes down to 0: scale 1, 7 saturates
        (partial(peers.e2m1_power_of_two, round_exponent=torch.floor, top=4.0), [7.0, 0.3, 1.3], [6, 0.5, 1.5]),
        # SGLang: log2(7.1 / 6) = 0.2 goes up to 1: scale 2
        (partial(peers.e2m1_power_of_two, round_exponent=torch.ceil, top=6.0), [7.1, 0.6, 1.4], [8, 1, 1]),
        # the largest is positive: scale -1, codes 0 .. 15 stand for 8 .. -7
        (peers.q4_0, [8.0, -7.6, 0.4, 1.6], [8, -7, 0, 2]),
        (peers.q4_0, [-8.0, 7.6, 0.4, 1.6], [-8, 7, 0, 2]),
    ],
)
def test_a_group_by_hand(quantize: peers.Quantizer, given_values: list[float], expected: list[float]) -> None:
    decoded = quantize(torch.tensor(given_values))
    torch.testing.assert_close(decoded, torch.tensor(expected, dtype=torch.float32), rtol=2e-3, atol=2e-3)


SCALARS: dict[str, tuple[peers.Quantizer, int]] = {
    "absmax 4": (partial(peers.absmax, bits=4), 15),
    "absmax 2": (partial(peers.absmax, bits=2), 3),
    "minmax 4": (partial(peers.minmax, bits=4), 16),
    "minmax 2": (partial(peers.minmax, bits=2), 4),
    "zero point": (partial(peers.minmax_zero_point, bits=4, clip=0.95), 16),
    "half quadratic": (partial(peers.half_quadratic, bits=2), 4),
    "q4_0": (peers.q4_0, 16),
    "nvfp4": (peers.nvfp4, 15),
    "unit codebook": (lambda x: peers.unit_codebook(x, peers.lloyd_max(3) * x.shape[-1] ** -0.5), 8),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_group_has_no_more_values_than_its_codes(name: str) -> None:
    quantize, levels = SCALARS[name]
    for group in quantize(torch.randn(20, 256, generator=RANDOM)):
        assert len(group.unique()) <= levels
    # and more than half of them, so that no bit is wasted
    assert len(quantize(torch.randn(4096, generator=RANDOM)).unique()) > levels / 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=64), st.sampled_from([2, 3, 4, 8]))
def test_uniform_quantizers_err_by_half_a_step(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    # metadata is rounded to 2^-11 of a magnitude, or by 2^-25 where float16 is subnormal, up to 255 times
    slack = 255 * 2.0**-25 + 2**-10 * float(x.abs().max() + (x.max() - x.min()))
    symmetric_step = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    assert float((peers.absmax(x, bits) - x).abs().max()) <= symmetric_step / 2 + slack
    step = float(x.max() - x.min()) / (2**bits - 1)
    assert float((peers.minmax(x, bits) - x).abs().max()) <= step / 2 + slack


@pytest.mark.parametrize("name", SCALARS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not SCALARS[name][0](torch.zeros(3, 32)).any()


def test_metadata_beyond_float16_saturates() -> None:
    assert peers.fp16(torch.tensor([1e6, -1e6])).tolist() == [65504, -65504]


@pytest.mark.parametrize("name", ["absmax 4", "absmax 2", "minmax 4", "minmax 2", "q4_0", "nvfp4"])
def test_encoding_what_was_decoded_changes_nothing(name: str) -> None:
    once = SCALARS[name][0](torch.randn(50, 32, generator=RANDOM))
    # float16 metadata of a decoded group may differ in its last bit
    torch.testing.assert_close(SCALARS[name][0](once), once, rtol=2e-3, atol=2e-3)


# --- codebooks and rotations ---


def test_lloyd_max_levels_are_those_of_max_1960() -> None:
    torch.testing.assert_close(peers.lloyd_max(2), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), rtol=0, atol=5e-4)
    positive = torch.tensor([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
    torch.testing.assert_close(peers.lloyd_max(4)[8:], positive, rtol=0, atol=1e-3)


def test_lloyd_max_on_the_sphere() -> None:
    # one bit: the mean of |x|, gamma(d / 2) / (sqrt(pi) gamma((d + 1) / 2)); many dimensions: a Gaussian
    assert float(peers.lloyd_max(1, sphere_dim=64)[1]) == pytest.approx(
        math.exp(math.lgamma(32) - math.lgamma(32.5)) / math.sqrt(math.pi), rel=1e-3
    )
    torch.testing.assert_close(peers.lloyd_max(2, sphere_dim=4096) * 64, peers.lloyd_max(2), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rotation", [peers.hadamard, peers.random_rotation, lambda d: peers.hadamard_blocks(d, 32)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
def test_rotations_are_orthonormal(rotation: object, head_dim: int) -> None:
    matrix = rotation(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=2e-6)
    assert not torch.allclose(matrix, torch.eye(head_dim))


def test_hadamard_is_sylvesters() -> None:
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    torch.testing.assert_close(peers.hadamard(4), signs / 2)


def test_a_rotation_in_blocks_that_do_not_divide_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim=48"):
        peers.hadamard_blocks(48, 32)


# --- formats ---


def test_groups_along_tokens_end_with_a_shorter_one() -> None:
    part = peers.Part(lambda x: x.mean(-1, keepdim=True).expand_as(x), 2, 32, 4, axis="tokens")
    x = torch.arange(6.0)[:, None].expand(6, 2)[None, None]
    assert part.apply(x)[0, 0, :, 1].tolist() == [1.5, 1.5, 1.5, 1.5, 4.5, 4.5]


def test_groups_along_channels() -> None:
    part = peers.Part(lambda x: x.amax(-1, keepdim=True).expand_as(x), 2, 32, 2)
    x = torch.tensor([[[[1.0, 3, 5, 4], [0, -1, 2, 2]]]])
    assert part.apply(x).tolist() == [[[[3, 3, 5, 5], [0, 0, 2, 2]]]]


@pytest.mark.parametrize("tokens", [1, 33, 77])
@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_every_peer_keeps_shape_and_most_of_the_signal(method: peers.Method, tokens: int) -> None:
    key, value = TOKENS[:, :, :tokens], TOKENS[:, :, -tokens:]
    decoded = method.apply(5, key, value)
    for got, original in zip(decoded, (key, value), strict=True):
        assert got.shape == original.shape
        assert got.dtype == torch.float32
        assert relative_rms(got, original) < 0.7  # worst: 2-bit min-max groups of 64, 0.62 for one token
    assert method.source == "peer"


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [
        ("KIVI-4 g32 r0", 64, 4 + 32 / 32),
        ("KIVI-2 g32 r0", 128, 2 + 32 / 32),
        ("TurboQuant vLLM k8v4", 128, (128 + 64 + 4) * 8 / 256),  # bytes: TurboQuantConfig.slot_size
        ("TurboQuant vLLM 4bit", 128, (64 + 2 + 64 + 4) * 8 / 256),
        ("TurboQuant vLLM k3v4", 128, (48 + 2 + 64 + 4) * 8 / 256),
        ("TurboQuant vLLM 3bit", 64, (24 + 2 + 24 + 4) * 8 / 128),
        ("TurboQuant vLLM 3bit, 4 layers raw", 64, (4 * 16 + 26 * 3.375) / 30),
        ("TurboQuant paper, mse 3", 64, 3.25),
        ("QuantizedCache quanto-2 g64, own arithmetic", 128, 2 + 32 / 64),
        ("QuantizedCache hqq-4 g64, own arithmetic", 64, 4 + 32 / 64),
        ("QuaRot INT4", 64, 4.5),
        ("QuaRot INT4", 128, 4.25),
        ("QuaRot INT4", 256, 4.25),  # two groups a head
        ("fp8 e4m3, scale 1", 64, 8),
        ("NVFP4 g16", 64, 4.5),
        ("MXFP4 g32", 64, 4.25),
        ("SGLang fp4 mx16 g16", 64, 4.5),
        ("llama.cpp q4_0 rotated", 64, 18 * 8 / 32),  # bytes: ggml's block_q4_0, block_q8_0
        ("llama.cpp q8_0 rotated", 64, 34 * 8 / 32),
    ],
)
def test_bits(name: str, head_dim: int, bits: float) -> None:
    (method,) = [method for method in ALL if method.name == name]
    assert method.bits_per_value(head_dim) == pytest.approx(bits)


def test_names_are_unique() -> None:
    assert len({method.name for method in ALL}) == len(ALL)


def test_kivi_groups_keys_over_tokens_and_values_over_channels() -> None:
    key, value = peers.kivi(2).apply(0, TOKENS, TOKENS)
    whole_group = key[0, 0, :32]
    assert all(len(channel.unique()) <= 4 for channel in whole_group.T)
    assert any(len(token.unique()) > 8 for token in whole_group)
    assert all(len(token[:32].unique()) <= 4 for token in value[0, 0])


def test_kivis_residual_is_raw() -> None:
    key, value = peers.kivi(2, residual_tokens=32).apply(0, TOKENS, TOKENS)  # 77 tokens
    assert torch.equal(key[:, :, 64:], TOKENS[:, :, 64:])
    assert torch.equal(value[:, :, 45:], TOKENS[:, :, 45:])
    assert not torch.isclose(key[:, :, 32:64], TOKENS[:, :, 32:64]).all(-1).any()
    assert not torch.isclose(value[:, :, :45], TOKENS[:, :, :45]).all(-1).any()
    # all of a context shorter than the window
    key, value = peers.kivi(2, residual_tokens=128).apply(0, TOKENS, TOKENS)
    assert torch.equal(key, TOKENS)
    assert torch.equal(value, TOKENS)


def test_turboquant_keys_keep_their_norm_and_values_are_not_rotated() -> None:
    key, value = peers.turboquant_vllm("3bit").apply(0, TOKENS, TOKENS)
    torch.testing.assert_close(key.norm(dim=-1), TOKENS.norm(dim=-1), rtol=1e-3, atol=0)
    assert all(len(token.unique()) <= 8 for token in value[0, 0])


def test_vllm_keeps_two_layers_raw_at_each_end() -> None:
    method = peers.turboquant_vllm("3bit", layers=30)
    raw = [torch.equal(method.apply(layer, TOKENS, TOKENS)[0], TOKENS) for layer in range(30)]
    assert raw == [True] * 2 + [False] * 26 + [True] * 2
    assert peers.turboquant_vllm("3bit", layers=3).raw_layers == {0, 2}


def test_llama_cpp_rotates_values_in_blocks_of_64() -> None:
    method = peers.llama_cpp("q4_0")
    assert torch.equal(method.key.rotation(128), peers.hadamard(128))
    assert torch.equal(method.value.rotation(128), peers.hadamard_blocks(128, 64))
    assert torch.equal(method.key.rotation(192), peers.hadamard_blocks(192, 64))


def test_rotation_tames_an_outlier_channel() -> None:
    keys = TOKENS.clone()
    keys[..., 7] *= 50
    plain = peers.Part(partial(peers.absmax, bits=4), 4, 16, 64)
    rotated = peers.Part(partial(peers.absmax, bits=4), 4, 16, 64, rotation=peers.hadamard)
    others = [channel for channel in range(64) if channel != 7]
    error = [relative_rms(part.apply(keys)[..., others], keys[..., others]) for part in (plain, rotated)]
    assert error[1] < error[0]


def test_random_rotation_makes_the_spheres_quantizer_near_its_theory() -> None:
    """Distortion of Lloyd-Max at 2 and 4 bits, 0.1175 and 0.0095 (TurboQuant, theorem 1), for any input."""
    for bits, distortion in ((2, 0.1175), (4, 0.0095)):
        key, _ = peers.turboquant_paper(bits).apply(0, TOKENS, TOKENS)
        assert relative_rms(key, TOKENS) ** 2 == pytest.approx(distortion, rel=0.06)


def test_half_quadratic_beats_plain_minmax_on_outliers() -> None:
    x = torch.randn(200, 64, generator=RANDOM)
    x[:, 0] *= 6
    errors = [(quantize(x, 2) - x).abs().pow(0.7).mean() for quantize in (peers.half_quadratic, peers.minmax)]
    assert errors[0] < 0.99 * errors[1]


def test_one_step_of_half_quadratic_by_hand() -> None:
    """Values 0, 1, 2, 9 at 2 bits: 1/3 codes a unit, zero point 0, codes 0, 0, 1, 3, errors 0, 1, -1, 0.

    Of an error of 1 the threshold takes 1/10: outliers 0, 0.9, -0.9, 0. The zero point becomes the mean of
    code - (value - outlier) / 3 = 0, -1/30, 1/30, 0: 0 again, and nothing moves.
    """
    x = torch.tensor([0.0, 1, 2, 9])
    torch.testing.assert_close(peers.half_quadratic(x, 2, steps=1), torch.tensor([0.0, 0, 3, 9]), rtol=2e-3, atol=2e-3)
    # 0, 1, 1, 9: errors 0, 1, 1, 0; the zero point becomes the mean of 0, -1/30, -1/30, 0 = -1/60
    moved = peers.half_quadratic(torch.tensor([0.0, 1, 1, 9]), 2, steps=1)
    torch.testing.assert_close(moved, torch.tensor([0.05, 0.05, 0.05, 9.05]), rtol=2e-3, atol=2e-3)
    # 3.1 errs by 0.1, of which the threshold would take 0.2: no outlier; the mean is of 0, -0.1 / 3, -0.1 / 3, 0
    small = peers.half_quadratic(torch.tensor([0.0, 3.1, 3.1, 9]), 2, steps=1)
    torch.testing.assert_close(small, torch.tensor([0.05, 3.05, 3.05, 9.05]), rtol=2e-3, atol=2e-3)


# --- against the libraries, where they are installed ---


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_is_our_arithmetic(bits: int) -> None:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers.cache_utils import QuantoQuantizedLayer

    x = TOKENS.half()
    stored = QuantoQuantizedLayer(nbits=bits)
    stored.update(x, x.flip(2))
    theirs = stored.update(x[:, :, :0], x[:, :, :0])
    for got, expected in zip(
        peers.quantized_cache("quanto", bits).apply(0, x.float(), x.flip(2).float()), theirs, strict=True
    ):
        # quanto divides in float16: a value near a half step may go the other way
        assert torch.isclose(got, expected.float(), rtol=5e-3, atol=5e-3).float().mean() > 0.98
        original = x if expected is theirs[0] else x.flip(2)
        assert relative_rms(got, original) == pytest.approx(relative_rms(expected, original), rel=0.01)


def test_hqq_is_our_arithmetic() -> None:
    quantizer = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed").Quantizer
    x = torch.randn(300, 64, generator=RANDOM)
    for bits in (2, 4):
        codes, meta = quantizer.quantize(
            x, nbits=bits, axis=1, group_size=64, device="cpu", compute_dtype=torch.float32
        )
        theirs = quantizer.dequantize(codes, meta)
        assert relative_rms(peers.half_quadratic(x, bits), x) == pytest.approx(relative_rms(theirs, x), rel=0.01)
