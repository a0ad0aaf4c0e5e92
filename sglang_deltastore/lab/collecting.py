"""Moments of a transformers model's keys and queries, gathered as its attention is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..policy.moments import Moments
from .attention import attend

ATTENTION = "deltastore_moments"

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
    moments = _collecting[module.layer_idx]
    moments.is_capped = bool(options.get("softcap"))
    for one_query, one_key in zip(query, key, strict=True):
        moments.add(one_query.transpose(0, 1), one_key.transpose(0, 1))
    return attend(module, query, key, *args, **options)


AttentionInterface.register(ATTENTION, _observe)
AttentionMaskInterface.register(ATTENTION, eager_mask)
