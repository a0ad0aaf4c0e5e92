"""Which tokens of a page stay: importance from the attention that tokens receive, and the choice by it.

Legend: B sequences, H KV heads, G query heads of each KV head, Q queries, T tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PROTECTED = 1e30


@dataclass(frozen=True)
class Importance:
    """How a token's importance follows from the attention of a step's queries.

    last_queries   only a step's last so many queries count: SnapKV's observation window
                   (arXiv:2404.14469, section 4.1); None: all, as in H2O (arXiv:2306.14048, section 4)
    pool_tokens    maximum over so many neighbouring tokens (SnapKV, section 4.2); 1: none
    by_value_norm  times the token's value's norm (VATP, arXiv:2406.12335); L2, which no rotation changes
    """

    last_queries: int | None = None
    pool_tokens: int = 1
    by_value_norm: bool = False

    def of(self, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """weights [B, H, G, Q, T] after the softmax, value [B, H, T, D] -> importance [B, H, T] float32."""
        counted = weights if self.last_queries is None else weights[..., -self.last_queries :, :]
        importance = counted.sum((2, 3), dtype=torch.float32)
        if self.by_value_norm:
            importance = importance * value.float().norm(dim=-1)
        if self.pool_tokens > 1:
            importance = torch.nn.functional.max_pool1d(
                importance, self.pool_tokens, stride=1, padding=self.pool_tokens // 2
            )[..., : value.shape[2]]
        return importance


def protect(importance: torch.Tensor, first_tokens: int, last_tokens: int) -> torch.Tensor:
    """importance [B, H, T] with the first and the last tokens ahead of all others, the outermost most."""
    tokens = importance.shape[-1]
    position = torch.arange(tokens, device=importance.device)
    rank_first = (first_tokens - position).clamp_min(0)
    rank_last = (position - (tokens - last_tokens) + 1).clamp_min(0)
    return importance + torch.maximum(2 * rank_first, rank_last) * _PROTECTED


def keep_top(importance: torch.Tensor, count: int) -> torch.Tensor:
    """importance [B, H, T] -> positions [B, H, count] of the most important tokens, in order of position."""
    return importance.topk(count, dim=-1).indices.sort(dim=-1).values
