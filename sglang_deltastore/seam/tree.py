"""Our radix tree: SGLang's own on its Rust core, which also knows what its nodes share.

Every node's pages are encoded: SGLang inserts whole pages only, and a page's last tile is encoded
in the forward step that fills it, before the insert.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from ..radix import PageCensus, census
from ..sharing import RunningContext, Shape, TreePages
from ..sinks import FreePages
from .pool import DeltaKVPool


@dataclass
class TreeCounts:
    """What the tree has done since the server started; see stats.StoreStats."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    evicted_tokens: int = 0
    eviction_seconds: float = 0.0


class DeltaRadixCache(UnifiedRadixCache):
    changed = True
    """Whether pages may have changed owner since the last census."""

    facts: Any = None
    """facts.LiveFacts of the scheduler, once that is built."""

    def __init__(self, params: Any) -> None:
        self.counts = TreeCounts()
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.changed = True

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        self.changed = True
        if self.disable:
            return
        whole = up_to // self.page_size * self.page_size
        slots = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :whole]
        sharing = self.token_to_kv_pool_allocator.get_kvcache().sharing
        sharing.stored(slots, req.full_untruncated_fill_ids[:whole])
        if req.finished():
            prompt_tokens = len(req.origin_input_ids)
            sharing.ended(slots, req.cached_tokens, prompt_tokens)
            self.counts.requests += 1
            self.counts.prompt_tokens += prompt_tokens
            self.counts.hit_tokens += req.cached_tokens

    def update_eviction_metrics(self, num_evicted: int, start_time: float) -> None:
        super().update_eviction_metrics(num_evicted, start_time)
        if num_evicted > 0:
            self.counts.evictions += 1
            self.counts.evicted_tokens += num_evicted
            self.counts.eviction_seconds += time.perf_counter() - start_time


def create_tree(context: Any) -> DeltaRadixCache:
    """Factory for SGLang's registry of radix caches."""
    tree = create_unified_radix_cache(context, cache_class=DeltaRadixCache)
    allocator = tree.token_to_kv_pool_allocator
    if isinstance(pool := allocator.get_kvcache(), DeltaKVPool):  # another one is for the proof to refuse
        pool.store.sink_table.free_pages = FreePages(
            count=lambda: allocator.available_size() // pool.page_size, ids=allocator.get_all_free_pages
        )
    return tree


def page_census(scheduler: Any) -> PageCensus:
    """Count the scheduler's pages and frames by owner, now."""
    allocator, rows = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool
    pool, running = allocator.get_kvcache(), _running(scheduler)
    return census(
        num_pages=pool.store.num_pages,
        page_tokens=pool.page_size,
        free_pages=allocator.get_all_free_pages(),
        node_slots=scheduler.tree_cache.all_values_flatten(),
        running_slots=[_slots(scheduler, req) for req in running],
        num_frames=rows.size,
        free_frames=rows.free_slots,
        running_frames=[req.kv.req_pool_idx for req in running],
        records=pool.sharing,
    )


def tree_shape(scheduler: Any) -> Shape:
    """The scheduler's tree and running requests as nodes, contexts and conversations, now."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    walk = scheduler.tree_cache.tree_core.walk_for_kv_canary(unlocked_only=False, swa_resident_only=False)
    rows = (walk.slot_indices, walk.positions, walk.prev_slot_indices)
    pages = TreePages.of_slots(*(row.cpu().numpy() for row in rows), pool.page_size)
    in_nodes = torch.zeros(pool.store.num_pages + 1, dtype=torch.bool)
    in_nodes[torch.from_numpy(pages.ids)] = True
    contexts = [
        RunningContext.of_slots(_slots(scheduler, req), in_nodes, pool.page_size) for req in _running(scheduler)
    ]
    return Shape(pages, contexts, pool.sharing, pool.page_size)


def _running(scheduler: Any) -> list[Any]:
    """Every request that the scheduler may hold pages for, each once."""
    batches = [scheduler.running_batch, scheduler.last_batch]
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    return [req for req in {id(req): req for req in found}.values() if req.kv is not None and req.kv.holds_kv]


def _slots(scheduler: Any, req: Any) -> torch.Tensor:
    """The slots of a running request's whole context."""
    return scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len]
