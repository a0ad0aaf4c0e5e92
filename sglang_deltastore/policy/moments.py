"""Moments of a layer's keys and queries over a text, and the key basis that is fitted to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from deltastore_kernels.basis import KeyBasis, fit_key_basis, plain_key_basis

logger = logging.getLogger(__name__)

SKIPPED_TOKENS = 4
"""The first tokens of a sequence are attention sinks (Xiao et al., arXiv:2309.17453): keys unlike all others, which
would spoil mean and covariance."""


_SUMS = ("shift", "key_sum", "key_products", "query_products")


class Fit(NamedTuple):
    """A layer's basis, and the KV heads that got the plain one because their moments allow no other."""

    basis: KeyBasis
    plain_heads: list[int]


_NOTHING = torch.zeros(())  # to which sums on any device can be added


@dataclass
class Moments:
    """Sums over tokens for one layer's KV heads, on the device of its keys: `key_sum` [H, D] and `key_products`
    [H, D, D] of keys without `shift` [H, D]; `query_products` [H, D, D] of all queries of a KV head's group. float64,
    but for the products of one call, which are taken in float32.

    The shift is near the keys' mean: where a model's keys have a large bias, the differences of its squares would
    leave nothing of the covariance.

    is_capped: the layer caps its scores (Gemma 2). A capped score does not just shift with the keys' mean, so stored
    keys keep it.
    """

    tokens: int = 0
    shift: torch.Tensor | None = None
    key_sum: torch.Tensor = _NOTHING
    key_products: torch.Tensor = _NOTHING
    query_products: torch.Tensor = _NOTHING
    is_capped: bool = False

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """A sequence from its start: query [T, Hq, D], key [T, H, D], as attention multiplies them."""
        heads, head_dim = key.shape[1:]
        keys = key[SKIPPED_TOKENS:].transpose(0, 1).float()
        queries = query.unflatten(1, (heads, -1)).permute(1, 0, 2, 3).reshape(heads, -1, head_dim).float()
        if self.shift is None:
            self.shift = keys.mean(1)
        keys = keys - self.shift[:, None]
        self.tokens += keys.shape[1]
        self.key_sum = self.key_sum + keys.sum(1).double()
        self.key_products = self.key_products + (keys.mT @ keys).double()
        self.query_products = self.query_products + (queries.mT @ queries).double()

    def to(self, device: str) -> Moments:
        return replace(self, **{name: getattr(self, name).to(device) for name in _SUMS})

    def fit(self) -> Fit:
        """A head whose moments are not finite, or whose keys do not vary, gets the plain basis."""
        assert self.shift is not None, "nothing has been added"
        offset = self.key_sum / self.tokens
        covariance = self.key_products / self.tokens - offset[:, :, None] * offset[:, None, :]
        query_moment = self.query_products / self.tokens
        mean = self.shift.double() + offset
        if self.is_capped:
            covariance, mean = covariance + mean[:, :, None] * mean[:, None, :], torch.zeros_like(mean)
        sound = torch.stack([each.flatten(1).isfinite().all(1) for each in (mean, covariance, query_moment)]).all(0)
        sound &= torch.diagonal(covariance, dim1=1, dim2=2).sum(1) > 0
        one = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        usable = [torch.where(sound[:, None, None], each, one) for each in (covariance, query_moment)]
        fitted = fit_key_basis(torch.where(sound[:, None], mean, 0.0), *usable)
        heads, head_dim = mean.shape
        plain = plain_key_basis(heads, head_dim, mean.device)
        for field in fields(KeyBasis):
            tensor = getattr(fitted, field.name)
            sound &= tensor.flatten(1).isfinite().all(1)
        chosen = (
            torch.where(sound.view(-1, *[1] * (getattr(fitted, field.name).ndim - 1)), *both)
            for field in fields(KeyBasis)
            for both in [(getattr(fitted, field.name), getattr(plain, field.name))]
        )
        return Fit(KeyBasis(*(tensor.contiguous() for tensor in chosen)), (~sound).nonzero().flatten().tolist())


def joined(parts: Sequence[Moments], replicas: int) -> Moments:
    """One layer's moments from those of all ranks, in their order. `replicas` ranks in a row have the same KV head,
    each with its own part of the head's queries."""
    firsts = parts[::replicas]
    queries = [
        torch.stack([part.query_products for part in parts[at : at + replicas]]).sum(0)
        for at in range(0, len(parts), replicas)
    ]
    whole = {name: torch.cat([getattr(part, name) for part in firsts]) for name in ("shift", "key_sum", "key_products")}
    return Moments(firsts[0].tokens, query_products=torch.cat(queries), is_capped=firsts[0].is_capped, **whole)


def key_bases(layers: Sequence[Moments]) -> tuple[KeyBasis, ...]:
    """What is fitted to each layer's moments; the log names the heads that got the plain basis."""
    fits = [layer.fit() for layer in layers]
    for layer, fit in enumerate(fits):
        if fit.plain_heads:
            logger.warning(
                "DeltaStore: layer %d, KV heads %s: keys or queries that no basis can be fitted to (not finite, or all "
                "the same); these heads are stored as without calibration", layer, fit.plain_heads,
            )  # fmt: skip
    return tuple(fit.basis for fit in fits)
