"""SGLang's real radix tree with ours over it, and requests that go through it as the scheduler sends them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_deltastore.policy.config import Settings
from sglang_deltastore.seam.kv_pool import DeltaWindowKVPool
from sglang_deltastore.seam.tree import DeltaRadixCache
from sglang_deltastore.store.sinks import SinkTable

P = 4


def make_tree(
    num_pages: int,
    rows: int = 16,
    context: int = 256,
    show_prompts: bool = False,
    page_tokens: int = P,
    device: str = "cpu",
    pool: Any = None,
    window: int = 0,
    window_pages: int = 0,
    for_head: bool = False,
) -> DeltaRadixCache:
    if pool is None:  # not the real ones': there is no SGLang around it
        pool = DeltaWindowKVPool.__new__(DeltaWindowKVPool) if window else SimpleNamespace()
        pool.settings = Settings("deltastore", "k4v2", show_prompts=show_prompts)
        pool.store = SimpleNamespace(num_pages=num_pages, num_window_pages=window_pages)
    tokens, others = num_pages * page_tokens, (page_tokens, torch.int8, device, pool)
    allocator: Any = (
        SWATokenToKVPoolAllocator(tokens, window_pages * page_tokens, *others, need_sort=False)
        if window
        else PagedTokenToKVPoolAllocator(tokens, *others, need_sort=False)
    )
    table = SimpleNamespace(
        req_to_token=torch.zeros(rows + 1, context, dtype=torch.int32, device=device),
        size=rows, free_slots=list(range(1, rows + 1)),
    )  # fmt: skip
    table.write = lambda where, values: table.req_to_token.__setitem__(where, values.int())
    return DeltaRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=table,
            token_to_kv_pool_allocator=allocator,
            page_size=page_tokens,
            tree_components=(ComponentType.FULL, ComponentType.SWA) if window else (ComponentType.FULL,),
            sliding_window_size=window or None,
            is_eagle=for_head,
            # The compiled core wants tensors whose memory it can reach.
            tree_core_backend="rust" if device == "cpu" else "python",
        )
    )


@dataclass
class LiveTree:
    """A tree, the requests that run, and a number for each: `room` says how many pages fit.

    window: tokens that layers of another part of the store see, which has window_pages; 0: there is no such part;
    for_head: whether a head drafts (EAGLE), for which the tree tells pages by the next token, too.
    """

    num_pages: int = 64
    show_prompts: bool = False
    page_tokens: int = P
    device: str = "cpu"
    pool: Any = None
    num_sinks: int = 0
    window: int = 0
    window_pages: int = 0
    for_head: bool = False
    running: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = make_tree(
            self.num_pages, show_prompts=self.show_prompts, page_tokens=self.page_tokens, device=self.device,
            pool=self.pool, window=self.window, window_pages=self.window_pages, for_head=self.for_head,
        )  # fmt: skip
        self.tree.keep_sinks(SinkTable(self.num_sinks))
        self.allocator, self.rows = self.tree.token_to_kv_pool_allocator, self.tree.req_to_token_pool

    def match(self, tokens: list[int], extra_key: str | None = None) -> Any:
        """As for a request that waits: the tree may split a node for it."""
        return self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), extra_key)))

    def begin(self, prompt: list[int], extra_key: str | None = None, adapter: str | None = None) -> Any:
        """Admit a request, and compute its prompt. None: there is no room for it. adapter: a part of its extra_key, as
        SGLang makes it."""
        found = self.match(prompt[:-1], extra_key)
        hit = found.device_prefix_len
        lock = self.tree.lock(found.last_device_node)
        if not self.rows.free_slots or not self.make_room(len(prompt) - hit):
            self.tree.unlock(lock)
            return None
        row = self.rows.free_slots.pop()
        kv = ReqKvInfo(req_pool_idx=row, cache_protected_len=hit, kv_allocated_len=hit)
        req = SimpleNamespace(
            rid=str(row), kv=kv, priority=0, session_id=None, kv_rotation_base=None, extra_key=extra_key,
            cache_salt=None, origin_input_ids=array("q", prompt), full_untruncated_fill_ids=array("q", prompt),
            session=None, lock=lock, last_node=found.last_device_node, finished_reason=None, cached_tokens=hit,
            ended=False, lora_id=adapter, skip_radix_cache_insert=False, prefix_len=hit,
            swa_branching_seqlen=found.swa_branching_seqlen, already_computed=0, retracted_stain=False,
            materialized_host_hit_len=lambda: 0,
        )  # fmt: skip
        req._compute_max_prefix_len = lambda tokens: tokens - 1
        req.finished = lambda: req.ended
        req.get_fill_ids = lambda: req.full_untruncated_fill_ids  # all of the prompt, in one step
        self.tree.begin([req])
        if hit:
            self.rows.req_to_token[row, :hit] = self.tree.path_device_indices(req.last_node)[:hit].int()
        self._allocate(kv, len(prompt) - hit)
        self.running.append(req)
        return req

    def prefilled(self, req: Any) -> None:
        self.tree.checkpoint(req, up_to=len(req.origin_input_ids))

    def finish(self, req: Any, output: list[int]) -> None:
        """Its answer too is stored, but for what does not fit."""
        begin, kv = kv_len(req), req.kv
        if self.window:
            self.tree.evict_sliding_windows(req, begin)
        room = -begin % self.page_tokens + (self.allocator.available_size() if self.make_room(len(output)) else 0)
        output = output[:room]
        if output:
            self._allocate(kv, len(output))
        req.full_untruncated_fill_ids.extend(output)
        req.ended = True
        self.tree.checkpoint(req, up_to=kv.kv_allocated_len)
        rest = self.rows.req_to_token[kv.req_pool_idx, kv.cache_protected_len : kv.kv_allocated_len]
        self.allocator.free(rest.long())
        self.tree.unlock(req.lock)
        self.tree.on_release(req, checkpointed=True)
        self.rows.free_slots.append(kv.req_pool_idx)
        kv.req_pool_idx = None
        self.running.remove(req)

    def evict(self, tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=tokens, swa_num_tokens=tokens if self.window else 0))

    def pages_of(self, req: Any) -> list[int]:
        """Whole pages of its context, also when it has just ended."""
        whole = req.kv.kv_allocated_len // self.page_tokens * self.page_tokens
        slots = self.rows.req_to_token[int(req.rid), : whole : self.page_tokens]
        return (slots // self.page_tokens).tolist()

    def stored_pages(self) -> set[int]:
        return set((self.tree.all_values_flatten()[:: self.page_tokens] // self.page_tokens).tolist())

    def make_room(self, tokens: int) -> bool:
        short = -(-tokens // self.page_tokens) * self.page_tokens - self.allocator.available_size()
        if short > 0:
            self.evict(short)
        return self.allocator.available_size() >= -(-tokens // self.page_tokens) * self.page_tokens

    def _allocate(self, kv: ReqKvInfo, tokens: int) -> None:
        """A request's slots for its next tokens, as SGLang's scheduler takes them."""
        row, begin = self.rows.req_to_token[kv.req_pool_idx], kv.kv_allocated_len
        lengths = [torch.tensor([length]) for length in (begin, begin + tokens)]
        before, after = (length.to(self.device) for length in lengths)
        last = row[begin - 1 : begin].long() if begin else torch.tensor([-1]).to(self.device)
        slots = self.allocator.alloc_extend(before, lengths[0], after, lengths[1], last, tokens)
        row[begin : begin + tokens] = slots.int()
        kv.kv_allocated_len += tokens


def kv_len(req: Any) -> int:
    return req.kv.kv_allocated_len
