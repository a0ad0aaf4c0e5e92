"""DeltaKV without training: RoPE there and back as the model turns, which reference a token takes, bits by hand."""

from __future__ import annotations

import pytest
import torch

from sglang_deltastore.lab.collecting import turn_of
from sglang_deltastore.lab.residuals import STRIDE, Residuals, methods
from tests.lab import tiny

TURN = turn_of(tiny.model())
RANDOM = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 9, 45])
@pytest.mark.parametrize("method", methods(TURN, tiny.HEADS), ids=lambda method: method.kind)
def test_shapes_stay_and_most_of_the_signal(method: Residuals, tokens: int) -> None:
    key, value = tiny.keys_and_values(2, tokens)
    for got, given in zip(method.apply(0, key, value), (key, value), strict=True):
        assert got.shape == given.shape
        assert (got - given).norm() < 0.6 * given.norm()


def test_keys_turn_as_the_model_turns_them() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny.model()
    key, _ = tiny.keys_and_values(1, 40)
    cos, sin = model.model.rotary_emb(key, torch.arange(40)[None])
    expected, _ = apply_rotary_pos_emb(key, key, cos, sin)
    turn = turn_of(model)
    torch.testing.assert_close(turn(key, torch.arange(40)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turn(expected, -torch.arange(40)), key, rtol=1e-4, atol=1e-4)


def test_a_token_like_one_before_it_costs_next_to_nothing() -> None:
    """Tokens that repeat the references, in turn: of those, and of nothing else, the difference is small."""
    few = torch.randn(1, tiny.HEADS, 3, 32, generator=RANDOM)
    order = torch.randint(0, 3, (90,), generator=RANDOM)
    order[: 3 * STRIDE] = torch.arange(3).repeat_interleave(STRIDE)  # each is a reference once
    value = few[:, :, order]
    key = TURN(value, torch.arange(90))
    errors = {}
    for method in methods(TURN, tiny.HEADS):
        sides = zip(method.apply(0, key, value), (key, value), strict=True)
        errors[method.kind] = [float((seen - given).norm() / given.norm()) for seen, given in sides]
    for nearest, nothing in zip(errors["nearest"], errors["nothing"], strict=True):
        assert nearest < 0.5 * nothing


def test_bits() -> None:
    scale = 4.5 / 64
    nearest, mean, nothing = (method.bits_per_value(64) for method in methods(TURN, heads=3))
    assert nothing == pytest.approx(0.9 * (2 + scale) + 0.1 * (3.5 + scale))
    assert nearest == pytest.approx(nothing + 0.9 * 8 / (2 * 3 * 64))
    assert mean == pytest.approx(2 + scale + 1)
