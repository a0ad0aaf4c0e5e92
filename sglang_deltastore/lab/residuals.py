"""DeltaKV without its training (arXiv:2602.08005): tokens as what they are beyond a token before them.

The paper stores f(kv) - f(mean of the nearest references), f learned; its 29% of the memory rest on that. What is left
without f is here: one token in ten is a reference, stored finely, and any other the difference from the nearest
reference before it, over the keys before RoPE and the values of all heads together.

Legend: B sequences, H KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ablations import Steps
from .eviction.expected import Turn
from .peers import by_group, fp16

STRIDE = 10
"""Tokens from one reference to the next."""
_TILE_TOKENS = 16
_REFERENCE = Steps("", 4, 3, key_means=False, sink_tokens=0)
_RESIDUAL = Steps("", 2, 2, key_means=False, sink_tokens=0)


@dataclass(frozen=True)
class Residuals:
    """kind: what a token is stored beyond: "nearest" reference, the float16 "mean" of its tile of 16 tokens, or
    "nothing". Positions count from 0; turn: the model's RoPE; heads of a layer share a reference's number."""

    kind: str
    turn: Turn
    heads: int
    source: str = "peer"

    @property
    def name(self) -> str:
        beyond = {"nearest": "the nearest of every 10th token", "mean": "their tile's mean", "nothing": "nothing"}
        return f"DeltaKV untrained, 2 bits beyond {beyond[self.kind]}"

    def bits_per_value(self, head_dim: int) -> float:
        coded = _RESIDUAL.bits_per_value(head_dim)
        if self.kind == "mean":
            return coded + 16 / _TILE_TOKENS
        references = (_REFERENCE.bits_per_value(head_dim) - coded) / STRIDE
        number = 8 / (2 * self.heads * head_dim) if self.kind == "nearest" else 0
        return coded + references + number * (1 - 1 / STRIDE)

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(key.shape[2])
        still = torch.stack((self.turn(key, -positions), value))  # [2, B, H, T, D]
        seen = self._mean(still) if self.kind == "mean" else self._referenced(still)
        return self.turn(seen[0], positions), seen[1]

    def _mean(self, x: Tensor) -> Tensor:
        means = by_group(x.mT, _TILE_TOKENS, lambda tile: fp16(tile.mean(-1, keepdim=True)).expand_as(tile)).mT
        return means + _coded(_RESIDUAL, x - means)

    def _referenced(self, x: Tensor) -> Tensor:
        references = _coded(_REFERENCE, x[..., ::STRIDE, :])
        if self.kind == "nothing":
            seen = _coded(_RESIDUAL, x)
        else:
            # over both sides and all heads; a token knows the references up to its own place
            wanted, known = (each.permute(1, 3, 0, 2, 4).flatten(2) for each in (x, references))
            later = torch.arange(known.shape[1]) * STRIDE > torch.arange(wanted.shape[1])[:, None]
            nearest = torch.cdist(wanted, known).masked_fill(later, torch.inf).argmin(-1)  # [B, T]
            index = nearest[None, :, None, :, None].expand(2, -1, x.shape[2], -1, x.shape[4])
            beyond = references.gather(3, index)
            seen = beyond + _coded(_RESIDUAL, x - beyond)
        seen[..., ::STRIDE, :] = references
        return seen


def _coded(steps: Steps, x: Tensor) -> Tensor:
    """Our own codec, with keys and values as they come [2, B, H, T, D]."""
    return torch.stack(steps.apply(0, x[0], x[1]))


def methods(turn: Turn, heads: int) -> list[Residuals]:
    return [Residuals(kind, turn, heads) for kind in ("nearest", "mean", "nothing")]
