"""Our radix tree: SGLang's own on its Rust core, which also tells the facts what happens in it.

Every node's pages are encoded: SGLang inserts whole pages only, and a page's last tile is encoded
in the forward step that fills it, before the insert.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from ..observe.guard import GUARD
from ..observe.nodes import Mirror, Node
from .kv_pool import DeltaKVPool, packed_pool


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
    """Events of the tree go to a mirror of it, on the host and guarded: they neither wait nor raise."""

    version = 0
    """Goes up whenever pages may have changed owner."""

    facts: Any = None
    """facts.LiveFacts of the scheduler, once that is built."""

    def __init__(self, params: Any) -> None:
        self.counts = TreeCounts()
        allocator = params.token_to_kv_pool_allocator
        settings = getattr(
            packed_pool(allocator.get_kvcache()), "settings", None
        )  # another pool is for the proof to refuse
        self.mirror = Mirror(params.page_size, self._path, bool(settings and settings.show_prompts))
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.version += 1
        self.mirror.clear()

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        self.version += 1
        if not self.disable:
            self._observe("a request is stored", self._stored, req)

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        path = GUARD.watch("a node is evicted", self._path, node_id)
        backup = super()._evict_device_leaf(node_id, tracker)
        self.version += 1
        if path is None:
            self.mirror.clear()
        else:
            self._observe("a node is evicted", self.mirror.evicted, path)
        return backup

    def update_eviction_metrics(self, num_evicted: int, start_time: float) -> None:
        super().update_eviction_metrics(num_evicted, start_time)
        if num_evicted > 0:
            self.counts.evictions += 1
            self.counts.evicted_tokens += num_evicted
            self.counts.eviction_seconds += time.perf_counter() - start_time

    def know(self, req: Any) -> None:
        """See to it that the mirror knows the node where a running request leaves the tree."""
        if req.kv.cache_protected_len and req.last_node not in self.mirror.nodes:  # a match has split one for it
            self._observe("a request runs", self._sync, req)

    def slots_of(self, node: Node) -> Any:
        """A node's slots [tokens] int64, on the allocator's device."""
        return self.tree_core.collect_full_device_indices(node.id, node.parent.id)

    def _observe(self, place: str, event: Any, *args: Any) -> None:
        """An event. If it fails the mirror begins anew, and finds nodes again as their paths come by."""
        errors = GUARD.errors
        GUARD.watch(place, event, *args)
        if GUARD.errors != errors:
            self.mirror.clear()

    def _stored(self, req: Any) -> None:
        last = self._sync(req)
        if req.finished():
            prompt_tokens = len(req.origin_input_ids)
            self.counts.requests += 1
            self.counts.prompt_tokens += prompt_tokens
            self.counts.hit_tokens += req.cached_tokens
            self.mirror.ended(last, req.cached_tokens, prompt_tokens)

    def _sync(self, req: Any) -> Node:
        """All nodes on a request's path in the tree. SGLang keeps requests with other keys and salts below the same
        root: they tell equal tokens apart."""
        namespace = req.extra_key, req.cache_salt
        return self.mirror.stored(self._path(req.last_node), req.full_untruncated_fill_ids, namespace)

    def _path(self, node_id: int) -> Any:
        return self.tree_core.collect_path_info([node_id])[0]


def create_tree(context: Any) -> DeltaRadixCache:
    """Factory for SGLang's registry of radix caches."""
    tree = create_unified_radix_cache(context, cache_class=DeltaRadixCache)
    allocator = tree.token_to_kv_pool_allocator
    if isinstance(pool := packed_pool(allocator.get_kvcache()), DeltaKVPool):  # another one is for the proof to refuse
        pool.store.sink_table.free_pages = allocator.get_all_free_pages
    return tree


def running_requests(scheduler: Any) -> list[Any]:
    """Every request that the scheduler may hold pages for, each once."""
    batches = [scheduler.running_batch, scheduler.last_batch]
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    return [req for req in {id(req): req for req in found}.values() if req.kv is not None and req.kv.holds_kv]
