"""The facts in SGLang's own `/metrics` (--enable-metrics) and in its own log lines."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

from ..metrics import BYTES_KINDS, COUNTERS, GAUGES, PAGE_STATES, PREFIX
from ..stats import StoreStats
from .facts import LiveFacts
from .tree import DeltaRadixCache


class Metrics:
    """Our series beside SGLang's, in its collector's classes and under its labels, with the tier as one more."""

    def __init__(self, collector: Any, tier: str) -> None:
        # Only here: SGLang sets PROMETHEUS_MULTIPROC_DIR before its first import.
        from prometheus_client import Counter, Gauge

        self._labels = {**collector.labels, "tier": tier}
        names = tuple(self._labels)
        self._counted = dict.fromkeys(COUNTERS, 0.0)
        counter, gauge = collector._counter_cls or Counter, collector._gauge_cls or Gauge
        self._counters = {
            field: counter(f"{PREFIX}{field}_total", help_text, names) for field, help_text in COUNTERS.items()
        }

        def make_gauge(name: str, help_text: str, *more_labels: str) -> Any:
            return gauge(PREFIX + name, help_text, (*names, *more_labels), multiprocess_mode="mostrecent")

        self._gauges = {field: make_gauge(field, help_text) for field, help_text in GAUGES.items()}
        self._pages = make_gauge("pages", "Pages by state.", "state")
        self._bytes = make_gauge("resident_bytes", "Allocated bytes by kind.", "kind")

    def update(self, stats: StoreStats) -> None:
        for field, gauge in self._gauges.items():
            gauge.labels(**self._labels).set(getattr(stats, field))
        for field, counter in self._counters.items():
            value = getattr(stats, field)
            counter.labels(**self._labels).inc(value - self._counted[field])
            self._counted[field] = value
        for state in PAGE_STATES:
            self._pages.labels(**self._labels, state=state).set(getattr(stats, f"pages_{state}"))
        for kind in BYTES_KINDS:
            self._bytes.labels(**self._labels, kind=kind).set(getattr(stats, f"{kind}_bytes"))


def attach(_info: dict[str, Any], scheduler: Any) -> None:
    """AFTER Scheduler.get_init_info, behind facts.attach."""
    tree = scheduler.tree_cache
    if isinstance(tree, DeltaRadixCache) and scheduler.metrics_collector is not None:
        tree.facts.listeners.append(Metrics(scheduler.metrics_collector, tree.facts.recent().tier).update)


@dataclass
class DeltaPoolStats(PoolStats):
    """SGLang's figures for its log lines, with a few words of ours behind them."""

    facts: LiveFacts | None = None

    def get_prefill_usage_msg_parts(self) -> list[str]:
        return [*super().get_prefill_usage_msg_parts(), self._words()]

    def get_decode_usage_msg_parts(self) -> list[str]:
        return [*super().get_decode_usage_msg_parts(), self._words()]

    def _words(self) -> str:
        return words(self.facts.recent())


def words(stats: StoreStats) -> str:
    """What a log line says of us."""
    return f"deltastore: {stats.tier} {stats.ratio:.2f}x, shared {stats.dedup:.2f}x"


def add_words(stats: Any, observer: Any) -> Any:
    """AFTER SchedulerPoolStatsObserver.get_pool_stats."""
    tree = observer.tree_cache
    if not isinstance(tree, DeltaRadixCache) or tree.facts is None:
        return None
    return DeltaPoolStats(**{field.name: getattr(stats, field.name) for field in fields(stats)}, facts=tree.facts)
