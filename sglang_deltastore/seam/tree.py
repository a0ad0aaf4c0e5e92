"""Our radix tree: SGLang's own on its Rust core, which also tells what happens in it: the sinks, and the facts.

Every node's pages are encoded: SGLang inserts whole pages only, and a page's last tile is encoded
in the forward step that fills it, before the insert.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_cache.component_type import BASE_COMPONENT_TYPE
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from ..observe.guard import GUARD
from ..observe.hit_curve import HitCurve, PageKeys, page_keys
from ..observe.nodes import Mirror, Node
from ..store.levels import COARSE, Levels
from ..store.sinks import Beginning, SinkTable, beginning_with
from .kv_pool import DeltaKVPool, packed_pool


@dataclass
class TreeCounts:
    """What the tree has done since the server started; see stats.StoreStats."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    hit_coarse_tokens: int = 0
    evictions: int = 0
    evicted_tokens: int = 0
    eviction_seconds: float = 0.0
    host_loaded_tokens: int = 0


class DeltaRadixCache(UnifiedRadixCache):
    """Events of the tree go to a mirror of it, on the host and guarded: they neither wait nor raise."""

    version = 0
    """Goes up whenever pages may have changed owner."""

    facts: Any = None
    """facts.LiveFacts of the scheduler, once that is built."""

    canary: Any = None
    """live_quality.CanaryOfRequests, where requests are sampled."""

    levels: Levels | None = None
    """Where pages are of two."""

    hit_curve: HitCurve | None = None
    """Of the rank whose facts are read."""

    def __init__(self, params: Any) -> None:
        self.counts = TreeCounts()
        allocator = params.token_to_kv_pool_allocator
        # Another pool is for the proof to refuse.
        settings = getattr(packed_pool(allocator.get_kvcache()), "settings", None)
        show_prompts = bool(settings and settings.show_prompts)
        # What a head that drafts has stored of a token follows from the next one, too.
        self.mirror = Mirror(params.page_size, self._path, show_prompts, next_tokens=int(params.is_eagle))
        self.sinks = SinkTable(0)
        super().__init__(params)

    def keep_sinks(self, sinks: SinkTable) -> None:
        """From now on these are the sinks of requests and nodes."""
        self.sinks = sinks
        sinks.evict = self._evict_beginning

    def begin(self, requests: Iterable[Any]) -> None:
        """These requests have their rows in SGLang's request table, and run next."""
        self.sinks.hold({req.kv.req_pool_idx: beginning_of(req) for req in requests})
        if self.hit_curve:
            GUARD.watch("prompts are looked up", self._looked_up, requests, self.hit_curve)
        if self.levels:
            GUARD.watch("hits are counted by level", self._count_coarse, requests, self.levels)
        if self.canary:
            GUARD.watch("a canary begins", self.canary.begin, requests)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        self.sinks.release(req.kv.req_pool_idx)
        if self.canary:
            GUARD.watch("a canary ends", self.canary.end, req)

    def reset(self) -> None:
        super().reset()
        self.version += 1
        self.sinks.clear()
        if self.canary:
            self.canary.forget()
        if self.hit_curve:
            self.hit_curve.clear()
        #: by beginning, nodes of sequences that begin so, all leaves among them; and of each of those its beginning
        self._nodes: dict[Beginning, set[int]] = {}
        self._beginnings: dict[int, Beginning] = {}
        self.mirror.clear()

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        self.version += 1
        if self.disable:
            return
        if not self.is_root(req.last_node):
            self._remember(beginning_of(req), req.last_node)
        self._observe("a request is stored", self._stored, req)
        # Of a prompt in chunks, once: no part of it can be evicted before.
        if self.hit_curve and (req.finished() or up_to >= len(req.origin_input_ids)):
            GUARD.watch("a context is used", self._used, req, self.hit_curve)

    def init_load_back(self, params: Any) -> Any:
        loaded = super().init_load_back(params)
        if loaded and loaded[0]:
            self.version += 1
            self.counts.host_loaded_tokens += loaded[0]
            self._remember(beginning_of(params.req), loaded[1])
            self._observe("a node comes back", self._sync, params.req, loaded[1])
        return loaded

    def write_backup_storage(self, node_id: int) -> None:
        if self.enable_storage and len(self._path(node_id)) == 1:
            begun = self.tree_core.build_storage_backup_spec(node_id, pass_prefix_keys=False)
            if begun is not None:
                self.sinks.copy(beginning_with(begun.token_ids[0]))
                self.cache_controller.storage_host_pool.begins(int(begun.host_value[0]), begun.token_ids[0])
        super().write_backup_storage(node_id)

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        path = self._path(node_id)
        backup = super()._evict_device_leaf(node_id, tracker)
        self.version += 1
        self._forget(path)
        self._observe("a node is evicted", self.mirror.evicted, path)
        return backup

    def _evict_beginning(self, beginning: Beginning) -> None:
        """Evict all nodes that begin so. No request runs that does, and once all copies to the host that are under way
        have ended, nobody locks them."""
        self.writing_check(write_back=True)
        start, tracker = time.perf_counter(), dict.fromkeys(self.tree_components, 0)
        paths = self.tree_core.collect_path_info(list(self._nodes[beginning]))
        starts = {step.node_id: step.path_start for path in paths for step in path}
        for node_id in sorted(starts, key=starts.__getitem__, reverse=True):  # leaves first
            if self._evict_device_leaf(node_id, tracker) is None:
                continue
            if self.backup_node_for_write_back(node_id):
                self._demote(node_id, tracker)
            else:  # no room on the host
                self._drop_subtree_no_host(node_id, tracker)
        self.update_eviction_metrics(tracker[BASE_COMPONENT_TYPE], start)

    def _remember(self, beginning: Beginning, node_id: int) -> None:
        self.sinks.cache(beginning)
        self._nodes.setdefault(beginning, set()).add(node_id)
        self._beginnings[node_id] = beginning

    def _forget(self, path: Any) -> None:
        """The last node of a path is gone; the one above it may be a leaf now."""
        gone = path[-1].node_id
        if gone not in self._beginnings:  # SGLang could not write it to the host at first, and has kept it till now
            return
        beginning = self._beginnings.pop(gone)
        if len(path) > 1:
            self._remember(beginning, path[-2].node_id)
        nodes = self._nodes[beginning]
        nodes.remove(gone)
        if not nodes:
            del self._nodes[beginning]
            self.sinks.uncache(beginning)

    def update_eviction_metrics(self, num_evicted: int, start_time: float) -> None:
        super().update_eviction_metrics(num_evicted, start_time)
        self.version += 1  # nodes that stay may have given up their pages of layers with windows
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

    def _count_coarse(self, requests: Iterable[Any], levels: Levels) -> None:
        for req in filter(is_new, requests):
            if req.prefix_len:
                pages = self.prefix_device_indices(req)[:: self.page_size] // self.page_size
                self.counts.hit_coarse_tokens += levels.count(COARSE, pages) * self.page_size

    def _looked_up(self, requests: Iterable[Any], curve: HitCurve) -> None:
        """Those of them that are new. What came from host memory would be a miss without it."""
        for req in filter(is_new, requests):
            prompt_tokens = len(req.origin_input_ids)
            findable_tokens = req._compute_max_prefix_len(prompt_tokens)
            found_tokens = req.prefix_len - req.materialized_host_hit_len()
            curve.asked(self._page_keys(req, findable_tokens), prompt_tokens, found_tokens)

    def _used(self, req: Any, curve: HitCurve) -> None:
        curve.used(self._page_keys(req, req.kv.cache_protected_len))

    def _page_keys(self, req: Any, tokens: int) -> PageKeys:
        ids = req.full_untruncated_fill_ids[:tokens]  # a copy: the request's own grows meanwhile
        return page_keys(ids, self.page_size, (req.extra_key, req.cache_salt))

    def _sync(self, req: Any, last_node: int | None = None) -> Node:
        """All nodes on a request's path in the tree, down to its last one or to `last_node`. SGLang keeps requests with
        other keys and salts below the same root: they tell equal tokens apart."""
        path = self._path(req.last_node if last_node is None else last_node)
        return self.mirror.stored(path, req.full_untruncated_fill_ids, (req.extra_key, req.cache_salt))

    def _path(self, node_id: int) -> Any:
        return self.tree_core.collect_path_info([node_id])[0]


def create_tree(context: Any) -> DeltaRadixCache:
    """Factory for SGLang's registry of radix caches."""
    if context.enable_hierarchical_cache:
        from .host_pool import register

        register()
    tree = create_unified_radix_cache(context, cache_class=DeltaRadixCache)
    allocator = tree.token_to_kv_pool_allocator
    if isinstance(pool := packed_pool(allocator.get_kvcache()), DeltaKVPool):  # another one is for the proof to refuse
        tree.keep_sinks(pool.store.sink_table)
        if pool.store.levels:
            tree.levels = pool.store.levels
            tree.levels.free_pages = allocator.get_all_free_pages
    return tree


def begin_requests(_rows: list[int], _req_to_token_pool: Any, reqs: list[Any], tree_cache: Any) -> None:
    """AFTER allocation.alloc_req_slots."""
    if isinstance(tree_cache, DeltaRadixCache):
        tree_cache.begin(reqs)


def beginning_of(req: Any) -> Beginning:
    """Its first token, and the adapter; embeddings in place of a token, which SGLang does not cache, are a request's
    own."""
    return req.kv.req_pool_idx if req.skip_radix_cache_insert else beginning_with(req.origin_input_ids[0], req.lora_id)


def is_new(req: Any) -> bool:
    """Whether a request that runs next looks up its prompt for the first time."""
    return not (req.already_computed or req.retracted_stain or req.skip_radix_cache_insert)


def running_requests(scheduler: Any) -> list[Any]:
    """Every request that the scheduler may hold pages for, each once."""
    batches = [scheduler.running_batch, scheduler.last_batch]
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    return [req for req in {id(req): req for req in found}.values() if req.kv is not None and req.kv.holds_kv]
