"""Bytes of KV for each token, by tier. DeltaStore's come from the page layouts themselves."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from deltastore_kernels.layout import GPU_HEAD_DIMS, RAW, Format, PageLayout

from ..policy.precision import LADDERS
from ..policy.tiers import TIERS
from .tables import Model

STOCK_BYTES = {"fp16": 2, "fp8": 1}
"""Bytes of one stored value in SGLang's own caches (fp8: one scale for each layer, not counted)."""

LEVELS: dict[str, tuple[Format, ...]] = {name: (tier.format,) for name, tier in TIERS.items()} | LADDERS
"""The formats that pages of each of our tiers may have, finest first; what plans count is the last one."""


@dataclass(frozen=True)
class KvTier:
    """How KV is stored. Exactly one of: a stock format, a tier of tiers.py or precision.py, a ratio to fp16 that is
    assumed."""

    name: str
    what_if_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.what_if_ratio is None and self.name not in STOCK_BYTES and self.name not in LEVELS:
            raise ValueError(
                f"tier {self.name!r}: known are {', '.join((*STOCK_BYTES, *LEVELS))}; for what does not exist give an "
                "assumed ratio to fp16 as NAME=10.2"
            )
        if self.what_if_ratio is not None and not 0 < self.what_if_ratio < float("inf"):
            raise ValueError(f"tier {self.name}={self.what_if_ratio}: the ratio must be above 0")

    @property
    def label(self) -> str:
        """Says so where nothing of ours stores KV this way."""
        return self.name if self.what_if_ratio is None else f"{self.name} (what if: {self.what_if_ratio:g}x)"

    def bytes_per_token(self, model: Model, page_tokens: int = 16, tensor_parallel: int = 1) -> float:
        """Over all GPUs of a tensor-parallel group; KV heads are split between them, or repeated when too few."""
        heads = rank_heads(model, tensor_parallel)
        raw = tensor_parallel * model.layers * heads * model.head_dim * 2
        if self.what_if_ratio is not None:
            return raw * STOCK_BYTES["fp16"] / self.what_if_ratio
        if self.name in STOCK_BYTES:
            return raw * STOCK_BYTES[self.name]
        page_bytes = _page_bytes(LEVELS[self.name][-1], model.layers, heads, model.head_dim, page_tokens)
        return tensor_parallel * page_bytes / page_tokens

    def page_bytes(self, model: Model, page_tokens: int = 16) -> tuple[float, ...]:
        """Of one page, all layers, by level."""
        if self.name not in LADDERS:
            return (self.bytes_per_token(model, page_tokens) * page_tokens,)
        return tuple(
            _page_bytes(level, model.layers, model.kv_heads, model.head_dim, page_tokens)
            for level in LADDERS[self.name]
        )

    def bits(self, model: Model, page_tokens: int = 16) -> tuple[float, ...]:
        """Of a stored value, scales included, by level."""
        values = 2 * model.layers * model.kv_heads * model.head_dim * page_tokens
        return tuple(8 * page_bytes / values for page_bytes in self.page_bytes(model, page_tokens))

    def frame_bytes(self, model: Model, page_tokens: int = 16, tensor_parallel: int = 1) -> int:
        """Of one running request, over a tensor-parallel group: the raw tail that DeltaStore's tiers keep. An assumed
        ratio stands for all bytes."""
        if self.what_if_ratio is not None or self.name not in LEVELS:
            return 0
        heads = rank_heads(model, tensor_parallel)
        layout = PageLayout.holding(RAW, heads, model.head_dim, model.head_dim, page_tokens, GPU_HEAD_DIMS)
        return tensor_parallel * model.layers * layout.frame_bytes

    def ratio(self, model: Model, page_tokens: int = 16) -> float:
        """To fp16, for one GPU."""
        return FP16.bytes_per_token(model) / self.bytes_per_token(model, page_tokens)


@functools.cache
def _page_bytes(level: Format, layers: int, heads: int, head_dim: int, page_tokens: int) -> int:
    """All layers of one page on one GPU."""
    return layers * PageLayout.holding(level, heads, head_dim, head_dim, page_tokens, GPU_HEAD_DIMS).page_bytes


FP16 = KvTier("fp16")


def can_split(model: Model, tensor_parallel: int) -> bool:
    """Whether SGLang runs a group of so many GPUs: query heads are dealt out evenly, KV heads too or repeated."""
    few, many = sorted((model.kv_heads, tensor_parallel))
    return model.query_heads % tensor_parallel == 0 and many % few == 0


def rank_heads(model: Model, tensor_parallel: int) -> int:
    """KV heads that each GPU of a group holds. Raises ValueError for a group that cannot run."""
    if not can_split(model, tensor_parallel):
        raise ValueError(
            f"tensor_parallel={tensor_parallel}: {model.name} has {model.query_heads} query and {model.kv_heads} KV "
            "heads, which so many GPUs cannot share evenly"
        )
    return max(1, model.kv_heads // tensor_parallel)


def parse_tier(text: str) -> KvTier:
    """`fp16`, `fp8`, a tier's name, or NAME=RATIO for an assumed one (a bare number names itself)."""
    name, _, ratio = text.partition("=")
    if not ratio:
        try:
            return KvTier(f"{float(name.rstrip('x')):g}x", float(name.rstrip("x")))
        except ValueError as error:
            if "ratio" in str(error):
                raise
            return KvTier(name)
    try:
        value = float(ratio.rstrip("x"))
    except ValueError:
        raise ValueError(f"tier {text!r}: the ratio to fp16 must be a number, as in balanced=10.2") from None
    return KvTier(name, value)
