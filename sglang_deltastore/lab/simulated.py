"""A cache that holds plain floats and shows attention what a Method makes of them.

It runs what does not store bytes our way: the published method, peers, ablations. What attention
reads follows DeltaStoreCache: stored tokens through the method, a step's new tokens raw; or, with
`quantize_at_once`, all tokens through the method.
"""

from __future__ import annotations

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .attention import ATTENTION, mark
from .eviction import Importance, keep_top
from .method import Method
from .support import attention_shape


class SimulatedLayer(CacheLayerMixin):
    """One layer's keys and values [B, H, T, D], and the method that attention sees them through."""

    supports_early_init = False

    def __init__(self, method: Method, index: int, quantize_at_once: bool) -> None:
        super().__init__()
        self.method = method
        self.index = index
        self.quantize_at_once = quantize_at_once

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states [B, H, T, D], new -> what attention reads, [B, H, stored + T, D], same dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored = self.keys.shape[2]
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        if self.quantize_at_once:
            return self._seen(self.keys, self.values)
        if not stored:
            return key_states, value_states
        key, value = self._seen(self.keys[:, :, :stored], self.values[:, :, :stored])
        return torch.cat((key, key_states), dim=2), torch.cat((value, value_states), dim=2)

    def _seen(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.method.apply(self.index, key.float(), value.float())
        for name, given, got in zip(("keys", "values"), (key, value), seen, strict=True):
            if got.shape != given.shape:
                raise ValueError(f"{self.method.name}: apply made {name} {tuple(got.shape)} of {tuple(given.shape)}")
        return seen[0].to(key.dtype), seen[1].to(value.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1


class TopTokensLayer(SimulatedLayer):
    """Beside the method, drops all but the first step's tokens of most importance: once, of the whole layer.

    per_head: each KV head keeps its own tokens; else all heads of the layer keep the same.
    """

    def __init__(self, method: Method, index: int, share: float, per_head: bool) -> None:
        super().__init__(method, index, quantize_at_once=False)
        self.share = share
        self.per_head = per_head
        self.received: torch.Tensor | None = None  # [B, H, T] of the first step
        self.kept: torch.Tensor | None = None  # positions [B, H, n] of the first step's tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.kept is None:
            raise RuntimeError(
                f"layer {self.index} was not told what its tokens received; a cache that evicts needs "
                f"model.set_attn_implementation({ATTENTION!r})"
            )
        key, value = super().update(key_states, value_states)
        if self.kept is not None:
            positions = self.positions()
            assert positions is not None
            index = positions.unsqueeze(-1).expand(-1, -1, -1, key.shape[-1])
            key, value = key.gather(2, index), value.gather(2, index)
        return mark(key, self), value

    def positions(self) -> torch.Tensor | None:
        """Position of each key that `update` returned [B, H, K]; None: all."""
        if self.kept is None:
            return None
        batch, heads, _ = self.kept.shape
        assert self.received is not None
        later = torch.arange(self.received.shape[2], self.get_seq_length(), device=self.kept.device)
        return torch.cat((self.kept, later.expand(batch, heads, -1)), dim=2)

    def attended(self, weights: torch.Tensor, mask: torch.Tensor | None) -> None:
        """weights [B, H, G, Q, K] of a step; the first decides what stays."""
        if self.kept is not None:
            return
        self.received = Importance().of(weights, self.values)
        importance = self.received if self.per_head else self.received.sum(1, keepdim=True).expand_as(self.received)
        self.kept = keep_top(importance, max(round(self.share * importance.shape[2]), 1))


class SimulatedCache(Cache):
    """A method over a whole model. `shares`: kept share of each layer's tokens (see TopTokensLayer)."""

    def __init__(
        self,
        config: PreTrainedConfig,
        method: Method,
        *,
        quantize_at_once: bool = False,
        shares: list[float] | None = None,
        per_head: bool = False,
    ) -> None:
        num_layers = len(attention_shape(config).heads_by_layer)
        if shares is not None and quantize_at_once:
            raise ValueError("quantize_at_once with eviction: what is evicted follows from a step's attention")
        super().__init__(
            layers=[
                SimulatedLayer(method, index, quantize_at_once)
                if shares is None
                else TopTokensLayer(method, index, shares[index], per_head)
                for index in range(num_layers)
            ]
        )
