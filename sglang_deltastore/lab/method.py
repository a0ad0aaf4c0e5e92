"""What the laboratory compares: a rule that turns a layer's keys and values into what attention reads instead."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Method(Protocol):
    """One row of the table. A method may keep nothing between calls: each call holds all tokens so far."""

    name: str
    """The row's config, e.g. "KIVI-2 g32 r128"."""
    source: str
    """"ours" | "published" | "peer"."""

    def bits_per_value(self, head_dim: int) -> float:
        """All-in bits of a stored value, metadata included, averaged over keys and values."""
        ...

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [B, H, T, D] float32, keys after RoPE -> what attention reads instead, the same shapes."""
        ...
