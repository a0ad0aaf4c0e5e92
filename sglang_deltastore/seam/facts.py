"""From live SGLang objects to `stats.StoreStats`, and out through HTTP."""

from __future__ import annotations

from typing import Any

from ..stats import StoreStats
from ..tiers import describe
from .flags import settings_of
from .tree import DeltaRadixCache, page_census

STATE_KEY = "deltastore"
STATS_PATH = "/deltastore/stats"


def snapshot(scheduler: Any) -> StoreStats:
    """The store's facts now."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    store, pages = pool.store, page_census(scheduler)
    size = store.size
    capacity_tokens = store.num_pages * size.page_tokens
    fp16_bytes_per_token = size.raw_page_bytes / size.page_tokens
    return StoreStats(
        tier=pool.settings.tier_name,
        format=describe([layout.format for layout in size.layouts]),
        calibrated=pool.calibration is not None,
        page_tokens=size.page_tokens,
        capacity_tokens=capacity_tokens,
        bytes_per_token=size.bytes_per_token,
        fp16_bytes_per_token=fp16_bytes_per_token,
        ratio=fp16_bytes_per_token / size.bytes_per_token,
        resident_ratio=fp16_bytes_per_token * capacity_tokens / pool.get_kv_size_bytes(),
        pages_bytes=store.pages_bytes,
        frames_bytes=store.frames_bytes,
        sinks_bytes=store.sinks_bytes,
        scratch_bytes=size.scratch_bytes,
        pages_total=pages.total,
        pages_free=pages.free,
        pages_in_nodes=pages.in_nodes,
        pages_running=pages.running,
        shared_tokens=pages.shared_tokens,
        frames_total=pages.frames_total,
        frames_free=pages.frames_free,
        frames_running=pages.frames_running,
        sinks_total=store.num_sinks,
        sinks_free=store.sinks_free,
        sinks_missed=store.sinks_missed,
        encoded_tokens=store.encoded_tokens,
        accounting_errors=pages.errors,
    )


def add_to_internal_state(_result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER SchedulerInternalStateController._add_topology."""
    if isinstance(controller.scheduler.tree_cache, DeltaRadixCache):
        state[STATE_KEY] = snapshot(controller.scheduler).as_dict()


def add_route(server_args: Any, tokenizer_manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE _setup_and_run_http_server: GET /deltastore/stats, one snapshot for each scheduler."""
    if not settings_of(server_args).enabled:
        return

    from sglang.srt.entrypoints.http_server import app

    async def stats() -> list[dict[str, Any]]:
        states = await tokenizer_manager.get_internal_state()
        return [state[STATE_KEY] for state in states]

    app.add_api_route(STATS_PATH, stats, methods=["GET"])
