"""The sides of a comparison, each with the same bytes for KV.

Bytes count what holds KV: pages with their scales and padding, page 0, and for DeltaStore frames and sinks. Stock
SGLang counts as a deployment in 16 bits would store it, budget / (fp16 bytes of a token), although on a CPU in float32
its pool really takes twice the bytes. What attention needs for temporaries counts for nobody.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltastore_kernels.layout import PageLayout
from sglang_deltastore.host.server_process import Server
from sglang_deltastore.policy.tiers import SERVED_TIERS, TIERS
from sglang_deltastore.store.size import StoreSize

PAGE_TOKENS = 16
STOCK, RAW = "stock", "raw"

Options = dict[str, str | int | bool]


def names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """For argparse: an argument of names with commas between them, each a known one."""
    known = tuple(known)

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)}: unknown; known are {', '.join(known)}")
        return found

    return names


@dataclass(frozen=True, eq=False)
class Side:
    """One of the servers compared. `options`: SGLang's, by the names of its Python API."""

    name: str
    capacity_tokens: int
    options: Options = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The options as a command line."""
        found: list[str] = []
        for name, value in self.options.items():
            found += ["--" + name.replace("_", "-")] if value is True else ["--" + name.replace("_", "-"), str(value)]
        return found


@dataclass(frozen=True)
class Geometry:
    """KV heads of each layer of a model, and their dim."""

    heads_by_layer: list[int]
    head_dim: int

    @classmethod
    def of(cls, model: str | Path) -> Geometry:
        config = json.loads((Path(model) / "config.json").read_text())
        heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        return cls([heads] * layers, config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])

    def store_size(self, tier: str, frames: int) -> StoreSize:
        *fine, layouts = map(self._layouts, SERVED_TIERS[tier].levels or (tier,))
        # No context: no scratch.
        return StoreSize(layouts, frames, context_tokens=0, fine_layouts=next(iter(fine), ()))

    def _layouts(self, tier: str) -> tuple[PageLayout, ...]:
        return tuple(TIERS[tier].layouts(self.heads_by_layer, self.head_dim, PAGE_TOKENS))

    @property
    def fp16_bytes_per_token(self) -> int:
        return sum(self.heads_by_layer) * self.head_dim * 2 * 2


def sides(
    geometry: Geometry,
    tiers: Sequence[str],
    budget_bytes: int,
    running: int,
    calibration: str = "none",
    host_bytes: int = 0,
) -> list[Side]:
    """Stock SGLang, DeltaStore with raw pages, DeltaStore with each of `tiers`, and where there are `host_bytes` again
    with that much host memory behind it; `running` requests may run at once."""
    common: Options = {
        "device": "cpu", "dtype": "float32", "page_size": PAGE_TOKENS, "max_running_requests": running,
        "sleep_on_idle": True, "random_seed": 1, "enable_metrics": True,
    }  # fmt: skip
    stock_tokens = (budget_bytes // (geometry.fp16_bytes_per_token * PAGE_TOKENS) - 1) * PAGE_TOKENS  # less page 0
    found = [Side(STOCK, stock_tokens, {**common, "attention_backend": "torch_native"})]
    for name in dict.fromkeys((RAW, *tiers)):
        ours: Options = {
            "kv_compress": "deltastore", "kv_compress_tier": name,
            "kv_compress_calibration": "none" if name == RAW else calibration,
        }  # fmt: skip
        size = geometry.store_size(name, running)
        capacity_tokens = size.tokens_within(budget_bytes)
        found.append(Side(name, capacity_tokens, {**common, **ours}))
        if host_bytes and name != RAW:
            host = {
                "enable_hierarchical_cache": True,
                "hicache_ratio": host_bytes / size.bytes_per_token / capacity_tokens,
            }
            found.append(Side(f"{name} + host", capacity_tokens, {**common, **ours, **host}))
    return [
        Side(side.name, side.capacity_tokens, {**side.options, "max_total_tokens": side.capacity_tokens})
        for side in found
    ]


def check_bytes(side: Side, server: Server, budget_bytes: int) -> None:
    """What a DeltaStore server has really allocated stays within the budget. Raises RuntimeError."""
    if side.name == STOCK:
        return
    stats = server.store_stats()
    taken = stats.pages_bytes + stats.frames_bytes + stats.sinks_bytes
    if taken > budget_bytes or stats.pages_total * PAGE_TOKENS != side.capacity_tokens:
        raise RuntimeError(
            f"{side.name}: {taken} bytes and {stats.pages_total} pages; {budget_bytes} bytes were allowed and "
            f"{side.capacity_tokens // PAGE_TOKENS} pages expected"
        )


def check_holds(found: list[Side], longest_tokens: int) -> None:
    """Every side can run the longest request. Raises ValueError."""
    needed_tokens = (-(-longest_tokens // PAGE_TOKENS) + 2) * PAGE_TOKENS  # SGLang wants pages to spare
    for side in found:
        if side.capacity_tokens < needed_tokens:
            raise ValueError(
                f"{side.name} has room for {side.capacity_tokens} tokens; the longest request needs {needed_tokens}; "
                "give a larger --budget, or more --sessions so that the same share is more"
            )


def as_engine_options(side: Side) -> Mapping[str, str | int | bool]:
    """For `sglang.Engine(...)`, which has no metrics to serve."""
    return {name: value for name, value in side.options.items() if name != "enable_metrics"}
