"""Our radix tree: SGLang's own on its Rust core, which also knows what its nodes share.

Every node's pages are encoded: SGLang inserts whole pages only, and a page's last tile is encoded
in the forward step that fills it, before the insert.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from ..radix import PageCensus, census
from .pool import DeltaKVPool


class DeltaRadixCache(UnifiedRadixCache):
    changed = True
    """Whether pages may have changed owner since the last census."""

    def reset(self) -> None:
        super().reset()
        self.changed = True

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        self.changed = True
        if req.finished() and not self.disable:
            whole = up_to // self.page_size * self.page_size
            row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :whole]
            self.token_to_kv_pool_allocator.get_kvcache().sharing.used(row)


def create_tree(context: Any) -> DeltaRadixCache:
    """Factory for SGLang's registry of radix caches."""
    tree = create_unified_radix_cache(context, cache_class=DeltaRadixCache)
    allocator = tree.token_to_kv_pool_allocator
    if isinstance(pool := allocator.get_kvcache(), DeltaKVPool):  # another one is for the proof to refuse
        pool.store.free_pages = allocator.get_all_free_pages
    return tree


def page_census(scheduler: Any) -> PageCensus:
    """Count the scheduler's pages and frames by owner, now."""
    allocator, rows = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool
    pool = allocator.get_kvcache()
    running = [req for req in _requests(scheduler) if req.kv is not None and req.kv.holds_kv]
    return census(
        num_pages=pool.store.num_pages,
        page_tokens=pool.page_size,
        free_pages=allocator.get_all_free_pages(),
        node_slots=scheduler.tree_cache.all_values_flatten(),
        running_slots=[rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len] for req in running],
        num_frames=rows.size,
        free_frames=rows.free_slots,
        running_frames=[req.kv.req_pool_idx for req in running],
        sharing=pool.sharing,
    )


def check_when_idle(_result: None, scheduler: Any) -> None:
    """AFTER Scheduler.on_idle: the accounting identity, once after each burst of work."""
    tree = scheduler.tree_cache
    if not isinstance(tree, DeltaRadixCache) or not tree.changed or not scheduler.is_fully_idle():
        return
    tree.changed = False
    if errors := page_census(scheduler).errors:
        # SGLang's own reaction to a leak: stop, or warn where its strict check was turned off.
        scheduler.invariant_checker._report_leak("deltastore", "; ".join(errors))


def _requests(scheduler: Any) -> list[Any]:
    """Every request that the scheduler may hold pages for, each once."""
    batches = [scheduler.running_batch, scheduler.last_batch]
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    return list({id(req): req for req in found}.values())
