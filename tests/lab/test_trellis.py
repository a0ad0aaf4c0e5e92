"""Trellis codes against their definitions: every path tried, codes read back, errors of Gaussian rows."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deltastore_kernels.basis import KeyBasis, fit_key_basis
from deltastore_kernels.layout import Format
from deltastore_kernels.ops.decode.reference import levels_of
from deltastore_kernels.ops.encode.reference import _shaped
from sglang_deltastore.lab import trellis
from sglang_deltastore.lab.ablations import Steps
from sglang_deltastore.lab.trellis import TrellisCodec
from sglang_deltastore.policy.calibration import Calibration
from tests.lab.tiny import HEADS, keys_and_values

RANDOM = torch.Generator().manual_seed(0)
CODES = {
    "scalar 2": lambda: trellis.scalar(2),
    "scalar 4": lambda: trellis.scalar(4),
    "4 states 2": lambda: trellis.ungerboeck(2, 4),
    "4 states 3": lambda: trellis.ungerboeck(3, 4),
    "16 states 2": lambda: trellis.ungerboeck(2, 16),
    "bitshift 2": lambda: trellis.bitshift(2, 6),
}


def rows(heads: int, tokens: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian rows [H, N, D] at a scale of one each."""
    return torch.randn(heads, tokens, dims, generator=RANDOM), torch.ones(heads, tokens)


def shaping(heads: int, dims: int) -> torch.Tensor:
    """As a basis has it, for queries of a random covariance."""
    return basis(heads, dims).shaping


def basis(heads: int, dims: int) -> KeyBasis:
    turn = torch.randn(heads, dims, 3 * dims, generator=RANDOM) * torch.linspace(0.2, 3, dims)[:, None]
    return fit_key_basis(
        torch.randn(heads, dims, generator=RANDOM), torch.eye(dims).expand(heads, -1, -1), turn @ turn.mT
    )


def seen(error: torch.Tensor, shaped: torch.Tensor) -> torch.Tensor:
    """error [H, N, D] -> what queries see of it [H, N]."""
    strength = torch.diagonal(shaped, dim1=-2, dim2=-1)
    factor = shaped.tril(-1) * strength[..., None] + torch.diag_embed(strength)
    return (error @ factor.mT).square().sum(-1)


@pytest.mark.parametrize("name", CODES)
def test_codes_are_of_their_bits_and_none_is_wasted(name: str) -> None:
    code, (x, scale) = CODES[name](), rows(1, 300, 32)
    codes, cost = code.encode(x, scale)
    assert sorted(codes.unique().tolist()) == list(range(2**code.bits))
    torch.testing.assert_close(cost, (code.decode(codes) - x).square().sum(-1))


@pytest.mark.parametrize("name", ["4 states 2", "bitshift 2"])
def test_the_path_is_the_best_of_all(name: str) -> None:
    code, (x, scale) = CODES[name](), rows(2, 20, 5)
    every = code.decode(torch.tensor(list(product(range(4), repeat=5)), dtype=torch.uint8))
    least = (every - x[..., None, :]).square().sum(-1).amin(-1)
    torch.testing.assert_close(code.encode(x, scale)[1], least)


def test_one_state_rounds_as_the_codec_does() -> None:
    x, scale = rows(HEADS, 16, 32)
    matrices = shaping(HEADS, 32)
    codes, cost = _shaped(x[None], scale[None], 3, matrices)
    ours, our_cost = trellis.scalar(3).encode(x, scale, matrices)
    assert (levels_of(codes[0], 3) == trellis.scalar(3).decode(ours)).float().mean() > 0.99  # ties, other sums
    torch.testing.assert_close(our_cost, cost[0], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", CODES)
def test_the_cost_of_a_shaped_path_is_what_queries_see(name: str) -> None:
    code, (x, _) = CODES[name](), rows(HEADS, 40, 32)
    scale, matrices = torch.rand(HEADS, 40, generator=RANDOM) + 0.5, shaping(HEADS, 32)
    codes, cost = code.encode(x, scale, matrices)
    torch.testing.assert_close(cost, seen(code.decode(codes) * scale[..., None] - x, matrices), rtol=1e-3, atol=1e-3)


def test_states_take_errors_from_where_queries_look() -> None:
    (x, scale), matrices = rows(HEADS, 400, 64), shaping(HEADS, 64)
    costs = [float(trellis._trellis(2, states).encode(x, scale, matrices)[1].mean()) for states in (1, 4, 16)]
    assert costs[1] < 0.8 * costs[0]  # measured 0.73
    assert costs[2] < 0.95 * costs[1]
    code = trellis.ungerboeck(2, 16)
    assert costs[2] < float(seen(code.decode(code.encode(x, scale)[0]) - x, matrices).mean())


@pytest.mark.parametrize(("bits", "states", "of_lloyd_max"), [(2, 4, 0.76), (3, 4, 0.71), (2, 16, 0.74), (3, 16, 0.7)])
def test_gaussian_errors(bits: int, states: int, of_lloyd_max: float) -> None:
    """As a share of Lloyd and Max's, 0.1175 and 0.03454; 64 dims from state 0."""
    x, scale = rows(1, 2000, 64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    error = trellis.ungerboeck(bits, states).encode(x, scale)[1].mean() / 64
    assert error < of_lloyd_max * {2: 0.1175, 3: 0.03454}[bits]


def test_the_last_bits_of_a_code_follow_from_path_bits() -> None:
    """With 4 states: a set's low bit is the path bit before, its high one the sum of the dim's own and the one two
    before. So decoding costs a shift and an exclusive or for a whole register of dims."""
    code, (x, scale) = trellis.ungerboeck(2, 4), rows(1, 50, 32)
    codes = code.encode(x, scale)[0].long()
    path = torch.nn.functional.pad(codes & 1, (2, 0))
    low, high = path[..., 1:-1], path[..., 2:] ^ path[..., :-2]
    ascending = (codes >> 1) * 4 + 2 * high + low
    assert torch.equal(code.levels.flatten()[ascending], code.decode(codes))
    assert code.levels.flatten().diff().min() > 0


def codec(key_states: int, value_states: int, calibration: Calibration | None = None) -> TrellisCodec:
    return TrellisCodec("", (Format(3, 2),) * 2, key_states, value_states, calibration)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_method_keeps_shapes_and_first_tokens(tokens: int, calibrated: bool) -> None:
    key, value = keys_and_values(2, tokens)
    calibration = Calibration("", (basis(HEADS, 32),) * 2, {}) if calibrated else None
    seen_key, seen_value = codec(4, 4, calibration).apply(1, key, value)
    for got, given, worst in ((seen_key, key, 0.4), (seen_value, value, 0.4)):
        assert got.shape == given.shape
        assert torch.equal(got[:, :, :1], given[:, :, :1])
        assert (got - given).norm() < worst * given.norm()


def test_one_state_is_what_the_packed_store_decodes() -> None:
    """A tile of 16, sinks aside: sums in another order decide a few near ties the other way."""
    key, value = keys_and_values(1, 32, head_dim=64)
    steps = Steps("", 3, 2, key_means=False, sink_tokens=0).apply(0, key, value)
    for got, expected in zip(codec(1, 1).apply(0, key, value), steps, strict=True):
        assert (got - expected)[:, :, 1:].norm() < 0.01 * expected.norm()


def test_values_keep_their_length_along_themselves() -> None:
    _, value = keys_and_values(2, 200, head_dim=64)
    decoded = codec(4, 4).apply(0, value, value)[1]
    assert float(((decoded * value).sum(-1) / value.square().sum(-1))[:, :, 1:].mean()) == pytest.approx(1, abs=0.02)


def test_bits() -> None:
    assert codec(4, 4).bits_per_value(64) == pytest.approx(2.5 + 4.5 / 64)
    mixed = TrellisCodec("", (Format(3, 2), Format(4, 3)), 4, 4)
    assert mixed.bits_per_value(128) == pytest.approx(3 + 4.5 / 128)
