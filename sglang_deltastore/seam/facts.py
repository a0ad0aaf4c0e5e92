"""From live SGLang objects to `stats.StoreStats`, for whoever asks in the scheduler's process, and out of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..stats import StoreStats
from ..tiers import describe
from .tree import DeltaRadixCache, page_census, tree_shape

STATE_KEY = "deltastore"

NODES_SHOWN = 64
"""Of the tree's nodes, those with the most hits; the nodes above them come along."""

SAMPLE_SECONDS, SAMPLES = 5.0, 240
"""History of the last 20 minutes."""

_SAMPLED = (
    "logical_tokens", "conversation_tokens", "stored_tokens", "used_bytes", "pages_running", "prompt_tokens",
    "hit_tokens",
)  # fmt: skip

COST_SHARE, SHORTEST_PAUSE_SECONDS = 1 / 200, 1.0
"""Snapshots that nobody asked for (metrics, log lines, history) take at most this part of the scheduler's time, and
come no oftener than this."""


class LiveFacts:
    """Snapshots of one scheduler's store, and their history. `listeners` are called with every new one."""

    def __init__(self, scheduler: Any) -> None:
        self.listeners: list[Callable[[StoreStats], None]] = []
        self._scheduler = scheduler
        self._latest: StoreStats | None = None
        self._due_at_s = 0.0
        self._history: deque[dict[str, float]] = deque(maxlen=SAMPLES)

    def fresh(self) -> StoreStats:
        """The facts now; for who asked for them and waits."""
        started = time.perf_counter()
        values = snapshot(self._scheduler)
        if not self._history or values["taken_at_s"] - self._history[-1]["time_s"] >= SAMPLE_SECONDS:
            sampled = {name: values[name] for name in _SAMPLED}
            self._history.append({"time_s": values["taken_at_s"], **sampled})
        history = {name: [sample[name] for sample in self._history] for name in ("time_s", *_SAMPLED)}
        self._latest = StoreStats(**values, history=history, snapshot_seconds=time.perf_counter() - started)
        for listener in self.listeners:
            listener(self._latest)
        ended = time.perf_counter()
        self._due_at_s = ended + max((ended - started) / COST_SHARE, SHORTEST_PAUSE_SECONDS)
        return self._latest

    @property
    def due(self) -> bool:
        """Whether enough time has passed for a snapshot that nobody asked for."""
        return time.perf_counter() >= self._due_at_s

    def recent(self) -> StoreStats:
        """Facts for free, or nearly: the latest ones, unless new ones are due."""
        return self.fresh() if self._latest is None or self.due else self._latest

    def keep_history(self) -> None:
        """For while nobody asks for anything."""
        if not self._history or time.time() - self._history[-1]["time_s"] >= SAMPLE_SECONDS:
            self.recent()


def snapshot(scheduler: Any) -> dict[str, Any]:
    """All fields of StoreStats but the history and the snapshot's own cost."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    store, pages, shape = pool.store, page_census(scheduler), tree_shape(scheduler)
    size, reads = store.size, pool.decode_reads
    capacity_tokens = store.num_pages * size.page_tokens
    fp16_bytes_per_token = size.raw_page_bytes / size.page_tokens
    allocated_pages = store.num_pages + 1
    codes_bytes, scales_bytes = allocated_pages * size.codes_bytes, allocated_pages * size.scales_bytes
    maps_bytes = pool.sharing.nbytes + store.sink_table.of_page.nbytes
    used_bytes = (
        (pages.in_nodes + pages.running) * size.page_bytes
        + pages.frames_running * (size.frames_bytes // (size.num_frames + 1))
        + (store.sink_table.total - store.sink_table.free) * size.sink_bytes
    )
    fp16_unshared_bytes = shape.logical_tokens * fp16_bytes_per_token
    fp16_shared_bytes = shape.stored_tokens * fp16_bytes_per_token
    return {
        "tier": pool.settings.tier_name,
        "format": describe([layout.format for layout in size.layouts]),
        "calibrated": pool.calibration is not None,
        "page_tokens": size.page_tokens,
        "capacity_tokens": capacity_tokens,
        "bytes_per_token": size.bytes_per_token,
        "fp16_bytes_per_token": fp16_bytes_per_token,
        "ratio": fp16_bytes_per_token / size.bytes_per_token,
        "resident_ratio": fp16_bytes_per_token * capacity_tokens / pool.get_kv_size_bytes(),
        "pages_bytes": store.pages_bytes,
        "codes_bytes": codes_bytes,
        "scales_bytes": scales_bytes,
        "padding_bytes": store.pages_bytes - codes_bytes - scales_bytes,
        "frames_bytes": store.frames_bytes,
        "sinks_bytes": store.sinks_bytes,
        "maps_bytes": maps_bytes,
        "resident_bytes": pool.get_kv_size_bytes() + maps_bytes,
        "scratch_bytes": size.scratch_bytes,
        "used_bytes": used_bytes,
        "pages_total": pages.total,
        "pages_free": pages.free,
        "pages_in_nodes": pages.in_nodes,
        "pages_running": pages.running,
        "shared_tokens": pages.shared_tokens,
        "frames_total": pages.frames_total,
        "frames_free": pages.frames_free,
        "frames_running": pages.frames_running,
        "sinks_total": store.sink_table.total,
        "sinks_free": store.sink_table.free,
        "sinks_missed": store.sink_table.missed,
        "contexts": shape.num_contexts,
        "conversations": shape.num_conversations,
        "logical_tokens": shape.logical_tokens,
        "conversation_tokens": shape.conversation_tokens,
        "stored_tokens": shape.stored_tokens,
        "dedup": _quotient(shape.logical_tokens, shape.stored_tokens),
        "branch_dedup": _quotient(shape.logical_tokens, shape.conversation_tokens),
        "prefix_dedup": _quotient(shape.conversation_tokens, shape.stored_tokens),
        "fp16_unshared_bytes": fp16_unshared_bytes,
        "fp16_shared_bytes": fp16_shared_bytes,
        "times_unshared_fp16": _quotient(fp16_unshared_bytes, used_bytes),
        "times_shared_fp16": _quotient(fp16_shared_bytes, used_bytes),
        **asdict(scheduler.tree_cache.counts),
        "encoded_tokens": store.encoded_tokens,
        "encode_seconds": 0.0,
        "decode_steps": reads.steps,
        "decode_read_bytes": reads.bytes,
        "nodes_total": len(shape.heads),
        "nodes": shape.hottest(NODES_SHOWN),
        "accounting_errors": pages.errors,
        "taken_at_s": time.time(),
    }


def _quotient(whole: float, part: float) -> float:
    return whole / part if part else 1.0


def attach(_info: dict[str, Any], scheduler: Any) -> None:
    """AFTER Scheduler.get_init_info, which SGLang calls once the scheduler is built."""
    if isinstance(scheduler.tree_cache, DeltaRadixCache):
        scheduler.tree_cache.facts = LiveFacts(scheduler)


def when_idle(_result: None, scheduler: Any) -> None:
    """AFTER Scheduler.on_idle: after a burst of work the facts once, and the accounting identity with them."""
    tree = scheduler.tree_cache
    if not isinstance(tree, DeltaRadixCache) or not scheduler.is_fully_idle():
        return
    if not tree.changed or not tree.facts.due:
        tree.facts.keep_history()
        return
    tree.changed = False
    if errors := tree.facts.fresh().accounting_errors:
        # SGLang's own reaction to a leak: stop, or warn where its strict check was turned off.
        scheduler.invariant_checker._report_leak("deltastore", "; ".join(errors))


def add_to_internal_state(_result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER SchedulerInternalStateController._add_topology: out to the HTTP server's process."""
    tree = controller.scheduler.tree_cache
    if isinstance(tree, DeltaRadixCache):
        state[STATE_KEY] = tree.facts.fresh().as_dict()
