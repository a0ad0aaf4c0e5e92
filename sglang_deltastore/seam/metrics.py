"""The facts in SGLang's own `/metrics` (--enable-metrics) and in its own log lines."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

from ..observe.guard import GUARD
from ..observe.series import CanaryHistogram, Series
from ..observe.stats import StoreStats
from .facts import LiveFacts
from .tree import DeltaRadixCache


def attach(_info: dict[str, Any], scheduler: Any) -> None:
    """AFTER Scheduler.get_init_info, behind facts.attach."""
    tree = scheduler.tree_cache
    if isinstance(tree, DeltaRadixCache) and scheduler.metrics_collector is not None:
        GUARD.watch("metrics are made", _listen, tree, scheduler.metrics_collector)


def _listen(tree: DeltaRadixCache, collector: Any) -> None:
    """Our series beside SGLang's, in its collector's classes and under its labels, with the tier as one more."""
    # Only here: SGLang sets PROMETHEUS_MULTIPROC_DIR before its first import.
    from prometheus_client import Counter, Gauge, Histogram

    labels = {**collector.labels, "tier": tree.facts.recent().tier}
    series = Series(collector._counter_cls or Counter, collector._gauge_cls or Gauge, labels)
    tree.facts.listeners.append(series.update)
    if tree.canary:
        tree.canary.canary.listeners.append(CanaryHistogram(collector._histogram_cls or Histogram, labels))


@dataclass
class DeltaPoolStats(PoolStats):
    """SGLang's figures for its log lines, with a few words of ours behind them."""

    facts: LiveFacts | None = None

    def get_prefill_usage_msg_parts(self) -> list[str]:
        return [*super().get_prefill_usage_msg_parts(), *self._words()]

    def get_decode_usage_msg_parts(self) -> list[str]:
        return [*super().get_decode_usage_msg_parts(), *self._words()]

    def _words(self) -> list[str]:
        said = GUARD.watch("a log line", lambda: words(self.facts.recent()))
        return [] if said is None else [said]


def words(stats: StoreStats) -> str:
    """What a log line says of us."""
    return f"deltastore: {stats.tier} {stats.ratio:.2f}x, shared {stats.dedup:.2f}x"


def add_words(stats: Any, observer: Any) -> Any:
    """AFTER SchedulerPoolStatsObserver.get_pool_stats."""
    tree = observer.tree_cache
    if not isinstance(tree, DeltaRadixCache) or tree.facts is None:
        return None
    return DeltaPoolStats(**{field.name: getattr(stats, field.name) for field in fields(stats)}, facts=tree.facts)
