"""What is said of queries like the calibration's, of others, and of those that nothing can be said of."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from deltastore_kernels.basis import KeyBasis, fit_key_basis, plain_key_basis
from sglang_deltastore.observe import drift
from sglang_deltastore.observe.drift import PAUSE_SECONDS, QUERIES_PER_DIM, SAMPLE_TOKENS, Drift

LAYERS, HEADS, GROUP, D = 3, 2, 2, 32
TOKENS = D * QUERIES_PER_DIM // GROUP
"""That judge a layer, in several steps."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def queries(tokens: int, kind: int, seed: int = 0) -> torch.Tensor:
    """[tokens, Hq, D] of one of several kinds: each has directions of its own."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(kind))).Q
    drawn = torch.randn(tokens, HEADS * GROUP, D, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.logspace(1, -1, D) @ turn


def basis_for(kind: int) -> KeyBasis:
    by_head = queries(5000, kind, seed=100).unflatten(1, (HEADS, GROUP)).transpose(0, 1).flatten(1, 2)
    keys = torch.eye(D).expand(HEADS, D, D)
    return fit_key_basis(torch.zeros(HEADS, D), keys, by_head.mT @ by_head)


def served(observed: Drift, clock: Clock, kind: int, scale: float = 1.0) -> None:
    """Extend steps through all layers, far enough apart for each to be looked at."""
    for step in range(4 * LAYERS * TOKENS // SAMPLE_TOKENS):
        clock.now += PAUSE_SECONDS
        for layer in range(LAYERS):
            observed.extended(layer, scale * queries(SAMPLE_TOKENS, kind, seed=step))


def test_queries_like_the_calibration_s_are_near_one_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clock = Clock()
    observed = Drift([basis_for(1)] * LAYERS, clock)
    assert (observed.mean, observed.worst_layer, observed.recalibration_pays) == (0.0, 0.0, False), "not known yet"
    served(observed, clock, kind=1)
    # Sampling adds 1 / (2 * QUERIES_PER_DIM); twice that is allowed.
    assert 1 <= observed.mean <= observed.worst_layer < 1 + 1 / QUERIES_PER_DIM
    assert not observed.recalibration_pays and not caplog.records
    served(observed, clock, kind=2)
    assert observed.mean > 2 and observed.recalibration_pays
    served(observed, clock, kind=2)
    (said,) = caplog.messages
    assert "deltastore calibrate --text FILE --context-length T" in said
    served(observed, clock, kind=1)
    assert observed.mean < 1 + 1 / QUERIES_PER_DIM, "what was served long ago counts no more"


def test_layers_take_turns_with_a_pause_after_each_and_short_steps_add_up() -> None:
    clock = Clock()
    observed = Drift([basis_for(1)] * LAYERS, clock)
    turns = [observed._layer]
    for step in range(200):
        clock.now += PAUSE_SECONDS * (step >= 20)
        for layer in range(LAYERS):
            observed.extended(layer, queries(TOKENS // 8, 1, seed=step))
        if observed._layer != turns[-1]:
            turns.append(observed._layer)
        assert step >= 20 or len(turns) == 1 + (step >= 7), "no pause"
    assert sorted(turns[:LAYERS]) == list(range(LAYERS))
    assert turns[LAYERS:] == turns[:-LAYERS] and len(turns) > 2 * LAYERS
    assert observed.mean


def test_a_step_of_any_size_costs_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    observed = Drift([basis_for(1)] * LAYERS, Clock())
    monkeypatch.setattr(drift, "QUERIES_PER_DIM", 10**9)
    observed.extended(observed._layer, queries(10 * SAMPLE_TOKENS + 3, 1))
    assert SAMPLE_TOKENS * 0.9 < observed._queries / GROUP <= SAMPLE_TOKENS


def test_heads_that_are_stored_plain_have_nothing_to_gain_and_numbers_that_are_none_say_nothing() -> None:
    clock, plain = Clock(), plain_key_basis(HEADS, D, torch.device("cpu"))
    observed = Drift([plain] * LAYERS, clock)
    served(observed, clock, kind=2)
    assert (observed.mean, observed.worst_layer) == (1.0, 1.0)
    half = {name: torch.stack((getattr(basis_for(1), name)[0], getattr(plain, name)[1])) for name in vars(plain)}
    observed = Drift([replace(plain, **half)] * LAYERS, clock)
    served(observed, clock, kind=1)
    assert 1 < observed.mean < 1 + 1 / QUERIES_PER_DIM
    known = observed.mean
    served(observed, clock, kind=2, scale=torch.nan)
    assert observed.mean == known
