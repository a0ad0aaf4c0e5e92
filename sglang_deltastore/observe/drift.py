"""How far the queries that are served have moved from those that the calibration was made for.

A calibration leads the errors of rounded keys to where its text's queries do not look. `staleness` says what other
queries see of them, over what they would see with a calibration on themselves: 1 where there is nothing to gain.

One layer is looked at at a time, and only in extend steps, which no CUDA graph holds: some of a step's queries
are added to their second moment on the device (a few small kernels), until the layer can be judged; then the moment
comes to the host without being waited for, and the next layer's turn begins after a pause. So this takes the memory of
one layer's moment, and 1/200 of the host's time at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from deltastore_kernels.basis import KeyBasis, staleness
from deltastore_kernels.transfer import ToHost

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 128
"""Of an extend step, evenly taken from all of it: what a step costs is bounded, and a layer is judged by several
requests, since each by itself is unlike their mean."""

QUERIES_PER_DIM = 32
"""A layer is judged by this many times head_dim queries of a KV head. Too few fit a factor of their own: queries like
those of the calibration would be found stale by 1 / (2 * QUERIES_PER_DIM), 2%."""

PAUSE_SECONDS = 2.5
"""After each layer. Judging eight KV heads of 128 dims takes 12 ms of two busy cores: 1/200 of that."""

PAYS_FROM = 1.75
"""Errors of keys that are this many times what they could be are worth a new calibration. A first start's, for all of a
context of 8,192 tokens, reads 1.40 for prompts of 512, of prose, code or German, 1.2 for prompts of 2,048, 1.6 for
random tokens, 1.8 for prompts of 48. One for the first 4,096 positions alone reads 1.9 for a prompt at 6,000, where it
does more harm than good (SmolLM2)."""


class Drift:
    """Of one rank's KV heads; bases: by layer, as the calibration has them, on the host."""

    def __init__(self, bases: Sequence[KeyBasis], clock: Callable[[], float] = time.monotonic) -> None:
        self._bases, self._clock = bases, clock
        self._not_before, self._said = -math.inf, False
        self._staleness: dict[int, float] = {}
        self._begin(layer=0)

    def _begin(self, layer: int) -> None:
        self._layer, self._queries = layer, 0
        self._moment: torch.Tensor | None = None
        self._coming: ToHost | None = None

    @property
    def mean(self) -> float:
        """Over the layers; 0 until each of them has been judged."""
        known = self._staleness.values()
        return sum(known) / len(known) if len(known) == len(self._bases) else 0.0

    @property
    def worst_layer(self) -> float:
        return max(self._staleness.values()) if self.mean else 0.0

    @property
    def recalibration_pays(self) -> bool:
        return self.mean >= PAYS_FROM

    def extended(self, layer: int, query: torch.Tensor) -> None:
        """A layer's queries of an extend step, [T, Hq, D] on the device, as attention gets them."""
        if self._coming is not None:
            if self._coming.arrived:
                self._judge(self._coming.tensor)
        elif layer == self._layer and self._clock() >= self._not_before:
            self._add(query)

    def _add(self, query: torch.Tensor) -> None:
        heads, head_dim = self._bases[self._layer].mean.shape
        sample = query[:: -(-len(query) // SAMPLE_TOKENS)]
        by_head = sample.unflatten(1, (heads, -1)).permute(1, 0, 2, 3).flatten(1, 2).float()
        products = by_head.mT @ by_head
        self._moment = products if self._moment is None else self._moment.add_(products)
        self._queries += by_head.shape[1]
        if self._queries >= QUERIES_PER_DIM * head_dim:
            self._coming = ToHost(self._moment)

    def _judge(self, moment: torch.Tensor) -> None:
        if moment.isfinite().all():
            basis = self._bases[self._layer]
            one = torch.eye(basis.shaping.shape[-1])
            # Heads that no calibration can help are stored plain, and have nothing to gain.
            fitted = (basis.shaping != one).flatten(1).any(1)
            self._staleness[self._layer] = float(torch.where(fitted, staleness(basis, moment), 1.0).mean())
        self._begin((self._layer + 1) % len(self._bases))
        self._not_before = self._clock() + PAUSE_SECONDS
        if self.recalibration_pays and not self._said:
            self._said = True
            logger.warning(
                "DeltaStore: what is served is unlike the text of the calibration: errors of stored keys weigh %.2f "
                "times what they would with a calibration on it; make one, of text and length like your traffic: "
                "deltastore calibrate --text FILE --context-length T", self.mean,
            )  # fmt: skip
