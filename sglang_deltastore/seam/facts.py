"""From live SGLang objects to `stats.StoreStats`, for whoever asks in the scheduler's process, and out of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import zmq
from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_swa_tokens
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.runtime_context import get_parallel

from ..observe.canary import Canary, CanaryCounts, Tally
from ..observe.census import SLICE_SECONDS, Census, Counts, count_errors
from ..observe.drift import Drift
from ..observe.guard import GUARD
from ..observe.history import History
from ..observe.hit_curve import SIZES, HitCurve
from ..observe.nodes import Node
from ..observe.picture import Picture, RunningContext, picture
from ..observe.stats import CanaryPart, StoreStats
from ..policy.tiers import describe
from ..store.levels import COARSE, Levels
from ..store.sealed_page import StorageCounts
from .kv_pool import packed_pool
from .tree import DeltaRadixCache, running_requests

STATE_KEY = "deltastore"

COST_SHARE, SHORTEST_PAUSE_SECONDS = 1 / 200, 1.0
"""Snapshots take at most this part of the scheduler's time; those that nobody asked for (metrics, log lines, history)
come no oftener than this besides."""

ANSWER_SECONDS, IDLE_SECONDS = 0.25, 1.0
"""How long an idle scheduler looks at pages at a stretch: for who asks for facts, and of itself. It stops within a
slice when a request comes."""


class LiveFacts:
    """Snapshots of one scheduler's store, and their history. `listeners` are called with every new one."""

    def __init__(self, scheduler: Any, replica: int = 0) -> None:
        self.listeners: list[Callable[[StoreStats], None]] = []
        self._replica = replica
        self._scheduler, self._tree = scheduler, scheduler.tree_cache
        self._latest: StoreStats | None = None
        self._taken_at_s = self._cost_s = 0.0
        self._history = History()
        #: of each part of the store one, the current one last; empty: none is under way
        self._censuses: list[Census] = []
        self._found: tuple[str, ...] = ()
        #: of the tree that the censuses in hand look at; of the tree when the last one was done
        self._looked_at_version = self._settled_version = -1
        self._settled_at_s: float | None = None
        self._census_errors: tuple[str, ...] = ()

    def fresh(self) -> StoreStats:
        """The facts now."""
        started = time.perf_counter()
        values = snapshot(self._scheduler)
        # Nodes that the facts have lost sight of were not looked at.
        looked_at_all = self._settled_version == self._tree.version and not values["untracked_tokens"]
        values["census_current"] = looked_at_all and not values["frames_running"]
        values["census_age_s"] = -1.0 if self._settled_at_s is None else started - self._settled_at_s
        values["accounting_errors"] += self._census_errors
        self._history.add(values)
        columns = self._history.columns()
        cost_s = time.perf_counter() - started
        self._latest = StoreStats(**values, replica=self._replica, history=columns, snapshot_seconds=cost_s)
        for listener in self.listeners:
            listener(self._latest)
        self._taken_at_s = time.perf_counter()
        self._cost_s = self._taken_at_s - started
        return self._latest

    @property
    def _affordable(self) -> bool:
        return time.perf_counter() >= self._taken_at_s + self._cost_s / COST_SHARE

    @property
    def due(self) -> bool:
        """Whether enough time has passed for a snapshot that nobody asked for."""
        return self._affordable and time.perf_counter() >= self._taken_at_s + SHORTEST_PAUSE_SECONDS

    def recent(self) -> StoreStats:
        """Facts for free, or nearly: the latest ones, unless new ones are due."""
        return self.fresh() if self._latest is None or self.due else self._latest

    def asked(self) -> StoreStats:
        """Facts for who waits for them: new ones if they are affordable, or if nothing runs that they would hold up."""
        idle = self._scheduler.is_fully_idle()
        if idle:
            self.settle(ANSWER_SECONDS)
        return self.fresh() if self._latest is None or idle or self._affordable else self._latest

    def settle(self, most_seconds: float) -> None:
        """Look at pages while nothing runs and nobody knocks, until all are looked at or the time is over."""
        until = time.perf_counter() + most_seconds
        while self._settled_version != self._tree.version:
            self._look_on()
            if someone_knocks(self._scheduler) or time.perf_counter() >= until:
                return

    def _look_on(self) -> None:
        """A slice of a census, of new ones if the tree has changed."""
        tree = self._tree
        if not self._censuses or self._looked_at_version != tree.version:
            self._censuses, self._found = censuses(tree, self._scheduler.token_to_kv_pool_allocator), ()
            self._looked_at_version = tree.version
        if (errors := self._censuses[-1].go_on(SLICE_SECONDS)) is None:
            return
        self._found += errors
        self._censuses.pop()
        if not self._censuses:
            self._census_errors = () if untracked_tokens(tree) else self._found + level_errors(self._scheduler)
            self._settled_version = self._looked_at_version
            self._settled_at_s = time.perf_counter()

    def when_idle(self) -> tuple[str, ...]:
        """For while nothing runs: looks at the pages after a burst of work, and keeps the history. Returns what was
        found wrong, once."""
        if self._settled_version != self._tree.version:
            self.settle(IDLE_SECONDS)
            if self._settled_version == self._tree.version:
                return self.fresh().accounting_errors
        elif self._history.due(time.time()):
            self.recent()
        return ()


def censuses(tree: DeltaRadixCache, allocator: Any) -> list[Census]:
    """One of each part of the store, none begun."""
    page_tokens, nodes = tree.page_size, tree.mirror.order
    store = packed_pool(allocator.get_kvcache()).store
    free_pages = whole_contexts(allocator).get_all_free_pages()
    found = [Census(store.num_pages, page_tokens, free_pages, nodes, tree.slots_of)]
    if is_with_windows(allocator):
        free_pages = allocator.swa_attn_allocator.get_all_free_pages()

        def slots_of(node: Node) -> torch.Tensor:
            return allocator.translate_loc_from_full_to_swa(tree.slots_of(node))

        found.append(Census(store.num_window_pages, page_tokens, free_pages, nodes, slots_of, may_lack=True))
    return found


def level_errors(scheduler: Any) -> tuple[str, ...]:
    levels = packed_pool(scheduler.token_to_kv_pool_allocator.get_kvcache()).store.levels
    return levels.errors() if levels else ()


def is_with_windows(allocator: Any) -> bool:
    """Whether it deals out pages of two parts: what lies behind windows is freed."""
    return isinstance(allocator, SWATokenToKVPoolAllocator)


def whole_contexts(allocator: Any) -> Any:
    """The allocator of the part of the store that keeps whole contexts."""
    return allocator.full_attn_allocator if is_with_windows(allocator) else allocator


def someone_knocks(scheduler: Any) -> bool:
    """Whether a message waits for the scheduler; also where that cannot be seen."""
    sockets = (scheduler.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc)
    return not all(isinstance(socket, zmq.Socket) and not socket.poll(0) for socket in sockets)


def untracked_tokens(tree: DeltaRadixCache) -> int:
    """Tokens in the tree that its mirror does not know of. A mirror that knows of more begins anew: it lost track."""
    stored = tree.full_evictable_size() + tree.full_protected_size()
    if tree.mirror.stored_tokens > stored:
        tree.mirror.clear()
    return stored - tree.mirror.stored_tokens


def snapshot(scheduler: Any) -> dict[str, Any]:
    """All fields of StoreStats but the replica, the history, the census, and the snapshot's own cost."""
    tree, pool = scheduler.tree_cache, packed_pool(scheduler.token_to_kv_pool_allocator.get_kvcache())
    running = running_requests(scheduler)
    counts = page_counts(scheduler, running)
    untracked = untracked_tokens(tree)
    for req in running:
        tree.know(req)
    shape = picture(tree.mirror, [_context(req) for req in running])
    frames = [req.kv.req_pool_idx for req in running]
    return {
        **_of_store(pool),
        **_of_host(tree),
        **asdict(counts),
        "shared_tokens": tree.mirror.shared_tokens,
        "untracked_tokens": untracked,
        **_savings(pool, counts, shape),
        **asdict(tree.counts),
        **_of_hit_curve(tree.hit_curve),
        "encoded_tokens": pool.steps.encoded_tokens,
        "decode_steps": pool.steps.decode_steps,
        "decode_read_bytes": pool.steps.decode_read_bytes,
        "calibration_staleness": pool.drift.mean if pool.drift else 0.0,
        "worst_layer_staleness": pool.drift.worst_layer if pool.drift else 0.0,
        "recalibration_pays": bool(pool.drift and pool.drift.recalibration_pays),
        **_of_canary(tree.canary and tree.canary.canary),
        "nodes_total": len(tree.mirror.nodes),
        "nodes": shape.nodes,
        "accounting_errors": count_errors(counts, scheduler.req_to_token_pool.free_slots, frames),
        "observation_errors": GUARD.errors,
        "taken_at_s": time.time(),
    }


def _context(req: Any) -> RunningContext:
    stored_tokens = req.kv.cache_protected_len
    return RunningContext(req.last_node if stored_tokens else 0, req.kv.kv_allocated_len - stored_tokens)


def page_counts(scheduler: Any, running: list[Any]) -> Counts:
    """Pages and frames by owner, from integers that the host has."""
    allocator, rows, tree = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool, scheduler.tree_cache
    page_tokens = tree.page_size
    stored_tokens = tree.full_evictable_size() + tree.full_protected_size()
    return Counts(
        pages_total=packed_pool(allocator.get_kvcache()).store.num_pages,
        pages_free=whole_contexts(allocator).available_size() // page_tokens,
        pages_in_nodes=stored_tokens // page_tokens,
        pages_held=tree.full_protected_size() // page_tokens,
        pages_running=sum(
            -(-req.kv.kv_allocated_len // page_tokens) - req.kv.cache_protected_len // page_tokens for req in running
        ),
        frames_total=rows.size,
        frames_free=len(rows.free_slots),
        frames_running=len(running),
        **(window_counts(allocator, running, tree) if is_with_windows(allocator) else {}),
    )


def window_counts(allocator: Any, running: list[Any], tree: DeltaRadixCache) -> dict[str, int]:
    """The same of the pages of layers with windows; what of a running request's is freed SGLang knows."""
    page_tokens = tree.page_size
    return {
        "window_pages_total": packed_pool(allocator.get_kvcache()).store.num_window_pages,
        "window_pages_free": allocator.swa_available_size() // page_tokens,
        "window_pages_in_nodes": (tree.swa_evictable_size() + tree.swa_protected_size()) // page_tokens,
        "window_pages_running": sum(kv_private_swa_tokens(req.kv, page_tokens) for req in running) // page_tokens,
    }


def _of_host(tree: DeltaRadixCache) -> dict[str, Any]:
    if tree.host_pool_group is None:
        return {"host_capacity_tokens": 0, "host_tokens": 0, "host_bytes": 0, **_of_storage(StorageCounts())}
    host = tree.host_pool_group.anchor_entry.host_pool
    return {
        "host_capacity_tokens": host.size,
        "host_tokens": host.size - host.available_size(),
        "host_bytes": sum(rows.nbytes for rows in host.kv_buffer) + (host.sinks.nbytes if host.sinks else 0),
        **_of_storage(host.storage_counts),
    }


def _of_storage(counts: StorageCounts) -> dict[str, Any]:
    return {f"storage_{name}": count for name, count in asdict(counts).items()}


def _of_hit_curve(curve: HitCurve | None) -> dict[str, Any]:
    rates = curve.hit_rates() if curve else dict.fromkeys(SIZES, 0.0)
    fields = {f"hit_rate_{size:g}x".replace(".", "_"): rate for size, rate in rates.items()}
    return {**fields, "hit_rate_prompt_tokens": curve.prompt_tokens if curve else 0}


def _of_canary(canary: Canary | None) -> dict[str, Any]:
    counts = canary.counts if canary else CanaryCounts()
    return {
        "canary_share": canary.share if canary else 0.0,
        "canary_sequences": counts.sequences,
        "canary_tokens": counts.all.tokens,
        "canary_kl_nats": counts.all.kl_nats,
        "canary_kl_mean": counts.all.kl_mean,
        "canary_kl_worst": counts.all.kl_worst,
        "canary_top1_agreement": counts.all.top1_agreement,
        "canary_by_hit": _parts(counts.by_hit),
        "canary_by_context": _parts(counts.by_context),
        "canary_seconds": counts.seconds,
        "canary_waiting": canary.waiting if canary else 0,
        "canary_too_long": counts.too_long,
        "canary_not_comparable": counts.not_comparable,
        "canary_overtaken": counts.overtaken,
    }


def _parts(tallies: dict[str, Tally]) -> dict[str, CanaryPart]:
    return {
        name: CanaryPart(**{field: getattr(tally, field) for field in CanaryPart.__struct_fields__})
        for name, tally in tallies.items()
    }


def _of_store(pool: Any) -> dict[str, Any]:
    """What does not change, and the sinks."""
    store, size = pool.store, pool.store.size
    capacity_tokens = store.num_pages * size.page_tokens
    fp16_bytes_per_token = size.stock_page_bytes / size.page_tokens
    allocated = (store.num_pages + 1, store.num_window_pages + 1)
    codes_bytes, scales_bytes = size.codes_bytes(*allocated), size.scales_bytes(*allocated)
    maps_bytes = store.sink_of_frame.nbytes
    return {
        "tier": pool.settings.tier_name,
        "format": " to ".join(describe([layout.format for layout in layouts]) for layouts in size.levels),
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
        **_of_levels(store.levels, size.page_tokens),
        "draft_pool_bytes": size.draft_pool_bytes(store.num_pages),
        "sinks_total": store.sink_table.total,
        "sinks_free": store.sink_table.free,
        "sink_evictions": store.sink_table.evictions,
    }


def _of_levels(levels: Levels | None, page_tokens: int) -> dict[str, Any]:
    return {
        "coarse_tokens": levels.count(COARSE) * page_tokens if levels else 0,
        "demoted_tokens": levels.demoted_pages * page_tokens if levels else 0,
        "demotion_seconds": levels.demotion_seconds if levels else 0.0,
    }


def _savings(pool: Any, counts: Counts, shape: Picture) -> dict[str, Any]:
    store, size = pool.store, pool.store.size
    window_pages = counts.window_pages_in_nodes + counts.window_pages_running
    used_bytes = (
        store.used_bytes(counts.pages_in_nodes + counts.pages_running, window_pages)
        + counts.frames_running * (size.frames_bytes // (size.num_frames + 1))
        + (store.sink_table.total - store.sink_table.free) * size.sink_bytes
    )
    # SGLang's own pool would have freed as many pages behind windows.
    fp16_token_bytes = (size.raw_bytes(1, 0) if size.has_windows else size.stock_page_bytes) / size.page_tokens
    fp16_window_bytes, dedup = size.raw_bytes(0, window_pages), _quotient(shape.logical_tokens, shape.stored_tokens)
    fp16_unshared_bytes = shape.logical_tokens * fp16_token_bytes + fp16_window_bytes * dedup
    fp16_shared_bytes = shape.stored_tokens * fp16_token_bytes + fp16_window_bytes
    return {
        "contexts": shape.contexts,
        "conversations": shape.conversations,
        "logical_tokens": shape.logical_tokens,
        "conversation_tokens": shape.conversation_tokens,
        "stored_tokens": shape.stored_tokens,
        "dedup": dedup,
        "branch_dedup": _quotient(shape.logical_tokens, shape.conversation_tokens),
        "prefix_dedup": _quotient(shape.conversation_tokens, shape.stored_tokens),
        "used_bytes": used_bytes,
        "fp16_unshared_bytes": fp16_unshared_bytes,
        "fp16_shared_bytes": fp16_shared_bytes,
        "times_unshared_fp16": _quotient(fp16_unshared_bytes, used_bytes),
        "times_shared_fp16": _quotient(fp16_shared_bytes, used_bytes),
    }


def _quotient(whole: float, part: float) -> float:
    return whole / part if part else 1.0


def attach(_info: dict[str, Any], scheduler: Any) -> None:
    """AFTER Scheduler.get_init_info, which SGLang calls once the scheduler is built."""
    if isinstance(scheduler.tree_cache, DeltaRadixCache):
        scheduler.tree_cache.facts = LiveFacts(scheduler, get_parallel().dp_rank or 0)
        pool = packed_pool(scheduler.token_to_kv_pool_allocator.get_kvcache())
        # The facts of the first rank are those that are read.
        if get_parallel().attn_tp_rank == 0:
            scheduler.tree_cache.hit_curve = HitCurve(pool.store.num_pages, pool.store.size.page_tokens)
            if pool.calibration:
                pool.drift = Drift(pool.calibration.layers)


def when_idle(scheduler: Any) -> None:
    """BEFORE Scheduler.on_idle, at whose end SGLang may sleep until a message comes."""
    tree = scheduler.tree_cache
    if not isinstance(tree, DeltaRadixCache) or tree.facts is None or not scheduler.is_fully_idle():
        return
    if errors := GUARD.watch("while idle", tree.facts.when_idle):
        # SGLang's own reaction to a leak: stop, or warn where its strict check was turned off.
        scheduler.invariant_checker._report_leak("deltastore", "; ".join(errors))


def add_to_internal_state(_result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER SchedulerInternalStateController._add_topology: out to the HTTP server's process."""
    tree = controller.scheduler.tree_cache
    if isinstance(tree, DeltaRadixCache):
        facts = GUARD.watch("facts are asked for", lambda: tree.facts.asked().as_dict())
        if facts is not None:
            state[STATE_KEY] = facts
