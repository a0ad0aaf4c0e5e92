"""Moments against sums in float64, and what no basis can be fitted to."""

from __future__ import annotations

import pytest
import torch

from deltastore_kernels.basis import fit_key_basis, plain_key_basis
from sglang_deltastore.policy.moments import SKIPPED_TOKENS, Moments

HEADS, GROUP, D = 3, 2, 32


def sequence(tokens: int = 300, bias: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.linspace(0.2, 3, D)
    query = torch.randn(tokens, HEADS * GROUP, D, generator=generator) * stretch.flip(0)
    return query, torch.randn(tokens, HEADS, D, generator=generator) * stretch + bias


@pytest.mark.parametrize("bias", [0.0, 400.0])
def test_two_sequences_give_the_basis_of_all_their_tokens(bias: float) -> None:
    """A key bias of some hundreds, as Qwen2.5 has, costs no digit of the covariance."""
    moments, sequences = Moments(), [sequence(bias=bias, seed=seed) for seed in (1, 2)]
    for each in sequences:
        moments.add(*each)
    keys = torch.cat([key[SKIPPED_TOKENS:] for _, key in sequences]).double().transpose(0, 1)
    queries = torch.cat([query for query, _ in sequences]).double().view(-1, HEADS, GROUP, D)
    by_head = queries.transpose(0, 1).flatten(1, 2)
    covariance = torch.stack([head.T.cov(correction=0) for head in keys])
    wanted = fit_key_basis(keys.mean(1), covariance, by_head.mT @ by_head)
    got, plain_heads = moments.fit()
    assert plain_heads == []
    for name in ("mean", "rotation", "query_rotation", "shaping"):
        # float32 products of 600 tokens: some 1e-6 of the largest, which the inverse of a narrow direction doubles
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-3, atol=1e-3)


def test_keys_of_a_layer_that_caps_its_scores_keep_their_mean() -> None:
    query, key = sequence(bias=2.0)
    moments = Moments(is_capped=True)
    moments.add(query, key)
    keys = key[SKIPPED_TOKENS:].double().transpose(0, 1)
    queries = query.double().view(-1, HEADS, GROUP, D).transpose(0, 1).flatten(1, 2)
    wanted = fit_key_basis(torch.zeros(HEADS, D), keys.mT @ keys / keys.shape[1], queries.mT @ queries)
    for name in ("mean", "rotation"):
        torch.testing.assert_close(getattr(moments.fit().basis, name), getattr(wanted, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("what", ["NaN in a key", "infinite query", "constant keys"])
def test_a_head_that_cannot_be_fitted_gets_the_plain_basis_and_the_others_their_own(what: str) -> None:
    query, key = sequence()
    whole = Moments()
    whole.add(query, key)
    if what == "NaN in a key":
        key[100, 1, 5] = torch.nan
    elif what == "infinite query":
        query[100, GROUP, 5] = torch.inf
    else:
        key[:, 1] = 7.25
    moments = Moments()
    moments.add(query, key)
    basis, plain_heads = moments.fit()
    assert plain_heads == [1]
    plain = plain_key_basis(HEADS, D, torch.device("cpu"))
    for name in ("mean", "rotation", "query_rotation", "shaping"):
        assert torch.equal(getattr(basis, name)[1], getattr(plain, name)[1])
        torch.testing.assert_close(getattr(basis, name)[[0, 2]], getattr(whole.fit().basis, name)[[0, 2]])


@pytest.mark.parametrize("tokens", [SKIPPED_TOKENS + 1, 20])
def test_few_tokens_and_queries_of_nothing_give_a_finite_basis(tokens: int) -> None:
    query, key = sequence(tokens)
    moments = Moments()
    moments.add(torch.zeros_like(query), key)
    basis, plain_heads = moments.fit()
    assert plain_heads == (list(range(HEADS)) if tokens == SKIPPED_TOKENS + 1 else [])
    assert all(getattr(basis, name).isfinite().all() for name in ("mean", "rotation", "query_rotation", "shaping"))
    identity = basis.rotation.double() @ basis.query_rotation.double().mT
    torch.testing.assert_close(identity, torch.eye(D).double().expand_as(identity), rtol=0, atol=1e-4)
