"""How a layer of SGLang's scores, in our words."""

from __future__ import annotations

from typing import Any

from deltastore_kernels.context import Scoring


def scoring_of(layer: Any) -> Scoring:
    return Scoring(scale=layer.scaling, soft_cap=layer.logit_cap or 0.0, window_left=window_of(layer))


def window_of(layer: Any) -> int | None:
    """Tokens before the query that a layer's window lets it see, as SGLang and we count them; None: all."""
    window = layer.sliding_window_size
    return window if window is not None and window >= 0 else None
