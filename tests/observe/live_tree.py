"""SGLang's real radix tree with ours over it, and requests that go through it as the scheduler sends them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_deltastore.policy.config import Settings
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
) -> DeltaRadixCache:
    settings = Settings("deltastore", "k4v2", show_prompts=show_prompts)
    pool = pool or SimpleNamespace(settings=settings, store=SimpleNamespace(num_pages=num_pages))
    allocator = PagedTokenToKVPoolAllocator(
        num_pages * page_tokens, page_tokens, torch.int8, device, pool, need_sort=False
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
            tree_components=(ComponentType.FULL,),
            # The compiled core wants tensors whose memory it can reach.
            tree_core_backend="rust" if device == "cpu" else "python",
        )
    )


@dataclass
class LiveTree:
    """A tree, the requests that run, and a number for each: `room` says how many pages fit."""

    num_pages: int = 64
    show_prompts: bool = False
    page_tokens: int = P
    device: str = "cpu"
    pool: Any = None
    num_sinks: int = 0
    running: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = make_tree(
            self.num_pages, show_prompts=self.show_prompts, page_tokens=self.page_tokens, device=self.device,
            pool=self.pool,
        )  # fmt: skip
        self.tree.keep_sinks(SinkTable(self.num_sinks))
        self.allocator, self.rows = self.tree.token_to_kv_pool_allocator, self.tree.req_to_token_pool

    def match(self, tokens: list[int], extra_key: str | None = None) -> Any:
        """As for a request that waits: the tree may split a node for it."""
        return self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), extra_key)))

    def begin(self, prompt: list[int], extra_key: str | None = None) -> Any:
        """Admit a request, and compute its prompt. None: there is no room for it."""
        found = self.match(prompt[:-1], extra_key)
        hit = found.device_prefix_len
        lock = self.tree.lock(found.last_device_node)
        if not self.rows.free_slots or not self.make_room(len(prompt) - hit):
            self.tree.unlock(lock)
            return None
        row = self.rows.free_slots.pop()
        kv = SimpleNamespace(
            req_pool_idx=row, cache_protected_len=hit, cache_inserted_len=0, kv_allocated_len=len(prompt), holds_kv=True
        )
        req = SimpleNamespace(
            rid=str(row), kv=kv, priority=0, session_id=None, kv_rotation_base=None, extra_key=extra_key,
            cache_salt=None, origin_input_ids=array("q", prompt), full_untruncated_fill_ids=array("q", prompt),
            session=None, lock=lock, last_node=found.last_device_node, finished_reason=None, cached_tokens=hit,
            ended=False, lora_id=None, skip_radix_cache_insert=False,
        )  # fmt: skip
        req.finished = lambda: req.ended
        self.tree.begin([req])
        if hit:
            self.rows.req_to_token[row, :hit] = self.tree.path_device_indices(req.last_node)[:hit].int()
        self.rows.req_to_token[row, hit : len(prompt)] = self._slots(len(prompt) - hit)
        self.running.append(req)
        return req

    def prefilled(self, req: Any) -> None:
        self.tree.checkpoint(req, up_to=len(req.origin_input_ids))

    def finish(self, req: Any, output: list[int]) -> None:
        """Its answer too is stored, but for what does not fit."""
        begin, kv = kv_len(req), req.kv
        room = -begin % self.page_tokens + (self.allocator.available_size() if self.make_room(len(output)) else 0)
        output = output[:room]
        fresh = len(output) - (-begin % self.page_tokens)
        page_rest = min(len(output), -begin % self.page_tokens)
        last = int(self.rows.req_to_token[kv.req_pool_idx, begin - 1])
        self.rows.req_to_token[kv.req_pool_idx, begin : begin + page_rest] = torch.arange(
            last + 1, last + 1 + page_rest, dtype=torch.int32, device=self.device
        )
        if fresh > 0:
            self.rows.req_to_token[kv.req_pool_idx, begin + page_rest : begin + len(output)] = self._slots(fresh)
        req.full_untruncated_fill_ids.extend(output)
        kv.kv_allocated_len = begin + len(output)
        req.ended = True
        self.tree.checkpoint(req, up_to=kv.kv_allocated_len)
        rest = self.rows.req_to_token[kv.req_pool_idx, kv.cache_protected_len : kv.kv_allocated_len]
        self.allocator.free(rest.long())
        self.tree.unlock(req.lock)
        self.tree.on_release(req, checkpointed=True)
        self.rows.free_slots.append(kv.req_pool_idx)
        kv.holds_kv = False
        self.running.remove(req)

    def evict(self, tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=tokens))

    def pages_of(self, req: Any) -> list[int]:
        """Whole pages of its context."""
        whole = req.kv.kv_allocated_len // self.page_tokens * self.page_tokens
        slots = self.rows.req_to_token[req.kv.req_pool_idx, : whole : self.page_tokens]
        return (slots // self.page_tokens).tolist()

    def stored_pages(self) -> set[int]:
        return set((self.tree.all_values_flatten()[:: self.page_tokens] // self.page_tokens).tolist())

    def make_room(self, tokens: int) -> bool:
        short = -(-tokens // self.page_tokens) * self.page_tokens - self.allocator.available_size()
        if short > 0:
            self.evict(short)
        return self.allocator.available_size() >= -(-tokens // self.page_tokens) * self.page_tokens

    def _slots(self, tokens: int) -> torch.Tensor:
        return self.allocator.alloc(-(-tokens // self.page_tokens) * self.page_tokens)[:tokens].int()


def kv_len(req: Any) -> int:
    return req.kv.kv_allocated_len
