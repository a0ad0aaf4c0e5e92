"""First and second moments of a model's keys and queries over a text: what a key basis is fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from deltastore_kernels.basis import KeyBasis, fit_key_basis

from .attention import attend

ATTENTION = "deltastore_moments"
SKIPPED_TOKENS = 4
"""The first tokens of a sequence are attention sinks (Xiao et al., arXiv:2309.17453): keys unlike all others, which
would spoil mean and covariance."""


class Moments:
    """Sums over tokens for one layer, float64: keys [H, D] and [H, D, D], queries [H, D, D]."""

    def __init__(self) -> None:
        self.tokens = 0
        self.key_sum = self.key_products = self.query_products = torch.zeros(())

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """query [B, Hq, T, D], key [B, H, T, D], as attention multiplies them."""
        heads, head_dim = key.shape[1], key.shape[3]
        keys = key[:, :, SKIPPED_TOKENS:].transpose(0, 1).reshape(heads, -1, head_dim)
        queries = query.unflatten(1, (heads, -1)).transpose(0, 1).reshape(heads, -1, head_dim)
        self.tokens += keys.shape[1]
        self.key_sum = self.key_sum + keys.double().sum(1)
        self.key_products = self.key_products + (keys.mT @ keys).double()
        self.query_products = self.query_products + (queries.mT @ queries).double()

    def key_basis(self) -> KeyBasis:
        mean = self.key_sum / self.tokens
        covariance = self.key_products / self.tokens - mean[:, :, None] * mean[:, None, :]
        return fit_key_basis(mean, covariance, self.query_products / self.tokens)


_collecting: list[Moments] | None = None


@contextmanager
def collecting(model: PreTrainedModel) -> Iterator[list[Moments]]:
    """While inside, the model's forward passes add to the moments of its layers."""
    global _collecting  # noqa: PLW0603 (attention functions of transformers are called without any state of ours)
    before = model.config._attn_implementation
    _collecting = [Moments() for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)]
    model.set_attn_implementation(ATTENTION)
    try:
        yield _collecting
    finally:
        model.set_attn_implementation(before)
        _collecting = None


def _observe(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> Any:
    assert _collecting is not None, "moments are only collected inside `collecting`"
    _collecting[module.layer_idx].add(query, key)
    return attend(module, query, key, *args, **options)


AttentionInterface.register(ATTENTION, _observe)
AttentionMaskInterface.register(ATTENTION, eager_mask)
