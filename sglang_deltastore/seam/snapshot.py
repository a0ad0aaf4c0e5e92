"""One snapshot of a scheduler's store: each field of `stats.StoreStats` from SGLang's objects and ours."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_swa_tokens
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

from ..observe.canary import Canary, CanaryCounts, Tally
from ..observe.census import Counts, count_errors
from ..observe.guard import GUARD
from ..observe.hit_curve import SIZES, HitCurve
from ..observe.picture import Picture, RunningContext, picture
from ..observe.stats import CanaryPart
from ..policy.tiers import describe
from ..store.levels import COARSE, Levels
from ..store.sealed_page import StorageCounts
from .kv_pool import packed_pool
from .tree import DeltaRadixCache, running_requests


def is_with_windows(allocator: Any) -> bool:
    """Whether it deals out pages of two parts: what lies behind windows is freed."""
    return isinstance(allocator, SWATokenToKVPoolAllocator)


def whole_contexts(allocator: Any) -> Any:
    """The allocator of the part of the store that keeps whole contexts."""
    return allocator.full_attn_allocator if is_with_windows(allocator) else allocator


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
        "format": " to ".join(describe([layout.format for layout in layouts]) for layouts in size.layouts_by_level),
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
