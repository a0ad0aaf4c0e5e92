"""Which share of its tokens each layer keeps. Definitions: the DeltaStore reports' PreserveEarly and Adaptive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

EARLY_SHARE_OF_LAYERS = 0.2
"""These layers, from the first, keep every token;"""
SHARE_AFTER_EARLY = 0.70
"""the next one keeps this share, and from there it falls to the schedule's base."""
ADAPTIVE_MASS = 0.9
"""A layer is as spread as the share of tokens that together receive this much of its attention."""


def _check_base(base: float) -> None:
    if not 0 < base <= SHARE_AFTER_EARLY:
        raise ValueError(f"base={base}: the last layer's kept share must be above 0 and at most {SHARE_AFTER_EARLY}")


@dataclass(frozen=True)
class PreserveEarly:
    """Layer l of L keeps all while l < 0.2 L; then the share falls linearly from 0.70 to `base` at the last layer."""

    base: float

    def __post_init__(self) -> None:
        _check_base(self.base)

    def __str__(self) -> str:
        return f"PE{self.base * 100:g}"

    def shares(self, num_layers: int, spread: Sequence[float] = ()) -> list[float]:
        """Kept share of each layer; `spread` is not needed."""
        early = math.ceil(EARLY_SHARE_OF_LAYERS * num_layers)
        falling = num_layers - early
        step = (self.base - SHARE_AFTER_EARLY) / max(falling - 1, 1)
        return [1.0] * early + [SHARE_AFTER_EARLY + step * i for i in range(falling)]


@dataclass(frozen=True)
class Adaptive:
    """As PreserveEarly(base), but behind the early layers a share is proportional to how spread the layer's
    attention is; the mean share stays PreserveEarly's."""

    base: float

    def __post_init__(self) -> None:
        _check_base(self.base)

    def __str__(self) -> str:
        return f"Adaptive{self.base * 100:g}"

    def shares(self, num_layers: int, spread: Sequence[float]) -> list[float]:
        """Kept share of each layer from its `spread` (see `concentration`)."""
        if len(spread) != num_layers:
            raise ValueError(f"Adaptive needs the spread of all {num_layers} layers; got {len(spread)}")
        planned = PreserveEarly(self.base).shares(num_layers)
        early = sum(share == 1.0 for share in planned)
        return [1.0] * early + _proportional(spread[early:], sum(planned[early:]))


@dataclass(frozen=True)
class Even:
    """Every layer keeps the same share."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: a layer's kept share must be above 0 and at most 1")

    def __str__(self) -> str:
        return f"keep {self.share * 100:.3g}%"

    def shares(self, num_layers: int, spread: Sequence[float] = ()) -> list[float]:
        """Kept share of each layer; `spread` is not needed."""
        return [self.share] * num_layers


def _proportional(weights: Sequence[float], total: float) -> list[float]:
    """Shares of at most 1, proportional to `weights` below that, that sum to `total`."""
    shares = [0.0] * len(weights)
    open_layers = set(range(len(weights)))
    while open_layers:
        factor = (total - (len(weights) - len(open_layers))) / sum(weights[i] for i in open_layers)
        full = {i for i in open_layers if weights[i] * factor > 1}
        for i in full or open_layers:
            shares[i] = min(weights[i] * factor, 1.0)
        open_layers = open_layers - full if full else set()
    return shares


def concentration(received: torch.Tensor) -> float:
    """received [..., T] attention that each token receives -> the share of tokens, 0 to 1, that hold
    ADAPTIVE_MASS of it: small where few tokens hold most."""
    mass = received.double().flatten(0, -2).sum(0).sort(descending=True).values.cumsum(0)
    return (int((mass < ADAPTIVE_MASS * mass[-1]).sum()) + 1) / len(mass)


def kept_tokens(shares: Sequence[float], page_tokens: int, tile_tokens: int = 16) -> list[int]:
    """Kept tokens of a page for each layer: whole tiles, at least one.

    Rounding is carried on to the next layer, so that the mean share is the schedule's.
    """
    tiles, carry, kept = page_tokens // tile_tokens, 0.0, []
    for share in shares:
        wanted = share * tiles + carry
        count = min(max(math.floor(wanted + 0.5), 1), tiles)
        carry = wanted - count
        kept.append(count * tile_tokens)
    return kept
