"""Importance from a token's own key and value alone: the attention that a calibration's queries would pay them.

A page that many branches share is encoded once, before anyone knows what they will ask; this importance is known then.
Source: Expected Attention (Devoto et al., arXiv:2510.00636), here with the queries of a calibration text for those of
the prompt, and some distances for the average over the next positions.

Legend: B sequences, H KV heads, G query heads of each KV head, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DISTANCES = (24, 48, 96, 192, 384, 768, 1536)
"""Tokens between a key and the queries that are expected: from a page behind it to a long context, by octaves."""
_SMALLEST = 1e-6

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""x [..., T, D], distances [T] -> x as RoPE turns it by so many positions, which may be negative."""


@dataclass(frozen=True)
class Queries:
    """A layer's queries before RoPE: mean [H, D] and covariance [H, D, D], of all query heads of a KV head."""

    mean: torch.Tensor
    covariance: torch.Tensor


@dataclass(frozen=True)
class ExpectedAttention:
    """log of E[exp(score)] |v| over queries of a Gaussian with a layer's moments, mean of DISTANCES.

    scaling: of the scores, 1 / sqrt(D) in most models.
    """

    layers: Sequence[Queries]
    turn: Turn
    scaling: float

    def of(self, layer: int, key: torch.Tensor, value: torch.Tensor, first_position: int) -> torch.Tensor:
        """key after RoPE and value [B, H, T, D] of tokens from `first_position` on -> importance [B, H, T] float32."""
        queries, key = self.layers[layer], key.float()
        positions = torch.arange(first_position, first_position + key.shape[2], device=key.device)
        expected = []
        for distance in DISTANCES:
            # A query at position p + d reads a key of p as an unturned one reads that key turned by -d.
            seen = self.turn(key, -(positions + distance)) * self.scaling
            spread = ((seen @ queries.covariance) * seen).sum(-1)
            expected.append((seen * queries.mean[:, None]).sum(-1) + spread / 2)
        log_size = value.float().norm(dim=-1).clamp_min(_SMALLEST).log()
        return torch.stack(expected).mean(0) + log_size
