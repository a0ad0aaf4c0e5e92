"""What `deltastore quality` measures: our configurations through real bytes, others through a Method."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Cache, PreTrainedModel

from ..policy.calibration import Calibration
from ..policy.tiers import Tier
from .cache import DEFAULT_PAGE_TOKENS, DeltaStoreCache
from .evicting import Eviction
from .method import Method
from .quality import PROTOCOLS
from .simulated import SimulatedCache
from .support import attention_shape

EVICTING_PROTOCOLS = ("continue",)
"""What is evicted follows from attention that came before, so one pass over everything cannot show it."""


@dataclass(frozen=True)
class Ours:
    """A tier of ours, with or without eviction, through DeltaStoreCache."""

    name: str
    tier: Tier
    page_tokens: int = DEFAULT_PAGE_TOKENS
    eviction: Eviction | None = None
    calibration: Calibration | None = None
    source: str = "ours"

    @property
    def protocols(self) -> tuple[str, ...]:
        return EVICTING_PROTOCOLS if self.eviction else PROTOCOLS

    @property
    def needs_attention(self) -> bool:
        return bool(self.eviction and self.eviction.needs_attention)

    def cache(self, model: PreTrainedModel, quantize_at_once: bool) -> Cache:
        return DeltaStoreCache(
            model.config,
            self.tier,
            self.page_tokens,
            quantize_at_once=quantize_at_once,
            eviction=self.eviction,
            calibration=self.calibration,
        )

    def bits_per_value(self, cache: Cache, model: PreTrainedModel) -> float:
        """Measured on the cache."""
        assert isinstance(cache, DeltaStoreCache)
        return 16 * cache.bytes_in_use() / cache.raw_bytes()


@dataclass(frozen=True)
class Other:
    """Somebody else's method, its bytes counted as it declares them.

    shares: kept share of each layer's tokens; per_head: each KV head keeps its own (see TopTokensLayer).
    """

    name: str
    method: Method
    shares: tuple[float, ...] | None = None
    per_head: bool = False

    @property
    def source(self) -> str:
        return self.method.source

    @property
    def protocols(self) -> tuple[str, ...]:
        return PROTOCOLS if self.shares is None else EVICTING_PROTOCOLS

    @property
    def needs_attention(self) -> bool:
        return self.shares is not None

    def cache(self, model: PreTrainedModel, quantize_at_once: bool) -> Cache:
        shares = None if self.shares is None else list(self.shares)
        return SimulatedCache(
            model.config, self.method, quantize_at_once=quantize_at_once, shares=shares, per_head=self.per_head
        )

    def bits_per_value(self, cache: Cache, model: PreTrainedModel) -> float:
        kept = 1.0 if self.shares is None else sum(self.shares) / len(self.shares)
        return self.method.bits_per_value(attention_shape(model.config).head_dim) * kept
