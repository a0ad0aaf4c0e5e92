"""The attention that tells a cache what each token received, for models of transformers.

    model.set_attn_implementation(ATTENTION)

Caches that evict need it: a layer's `update` marks the keys it returns as its own; this attention
then asks the layer which position each key is at, and tells it the weights. Other keys: plain attention.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ATTENTION = "deltastore"
"""The name for `attn_implementation`."""
QUERY_ROWS = 512
"""Queries whose attention is computed at once: the weights of 4,096 over 4,096 keys would be gigabytes a layer, half of
them masked."""


class Observer(Protocol):
    """A cache layer that is told what its tokens receive."""

    def positions(self) -> torch.Tensor | None:
        """[B, H, K] position of each key that `update` just returned; None: 0, 1, 2 .. K - 1."""
        ...

    def attended(self, weights: torch.Tensor, mask: torch.Tensor | None) -> None:
        """weights [B, H, G, Q, K]: what each key received from the step's queries; mask [B, 1, Q, positions]
        additive, over all positions of the context, or None."""
        ...


def mark(key: torch.Tensor, observer: Observer) -> torch.Tensor:
    """The same keys, marked as an observer's."""
    key.deltastore_observer = observer
    return key


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, Q, D], key, value [B, H, K, D], attention_mask [B, 1, Q, positions] additive -> [B, Q, Hq, D]."""
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise ValueError(f"attention {ATTENTION!r}: learned sinks and position biases are not supported; use 'eager'")
    observer: Observer | None = getattr(key, "deltastore_observer", None)
    if observer is None and query.shape[2] > QUERY_ROWS:
        return _attend_by_rows(module, query, key, value, attention_mask, scaling, softcap, **options), None
    if observer is None and not softcap:  # nobody asks for the weights
        out = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    heads = key.shape[1]
    query = query.unflatten(1, (heads, -1)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (query @ key.unsqueeze(2).transpose(-1, -2)).float()  # [B, H, G, Q, K]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        positions = observer.positions() if observer else None
        scores = scores + _columns(attention_mask, positions, heads)
    weights = scores.softmax(-1)
    out = (weights.to(value.dtype) @ value.unsqueeze(2)).flatten(1, 2)
    if observer:
        observer.attended(weights, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _attend_by_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *scoring: float | None,
    **options: Any,
) -> torch.Tensor:
    """As `attend`, some queries at a time, over no keys that all of them are masked from: those behind the last, and
    where the layer has a window those before it."""
    stored, outs = key.shape[2] - query.shape[2], []
    for first in range(0, query.shape[2], QUERY_ROWS):
        rows = slice(first, min(first + QUERY_ROWS, query.shape[2]))
        window = options.get("sliding_window")
        keys = slice(max(stored + first + 1 - window, 0) if window else 0, stored + rows.stop)
        mask = None if attention_mask is None else attention_mask[:, :, rows, keys]
        outs.append(attend(module, query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, *scoring, **options)[0])
    return torch.cat(outs, dim=1)


def _columns(mask: torch.Tensor, positions: torch.Tensor | None, heads: int) -> torch.Tensor:
    """mask [B, 1, Q, positions] -> [B, 1 or H, 1, Q, K], the columns of the keys at `positions` [B, H, K]."""
    if positions is None:
        return mask.unsqueeze(2)
    batch, _, queries, columns = mask.shape
    wide = mask.expand(batch, heads, queries, columns)
    return wide.gather(3, positions.unsqueeze(2).expand(-1, -1, queries, -1)).unsqueeze(2)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)
