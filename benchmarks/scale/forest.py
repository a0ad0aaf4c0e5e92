"""A tree of a million pages on SGLang's own core, filled through the events that a server sends."""

from __future__ import annotations

import random
import time
from array import array
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from deltastore_kernels import ops
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.observe.reads import StepCounts
from sglang_deltastore.policy.config import Settings
from sglang_deltastore.seam.tree import DeltaRadixCache
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

PAGE_TOKENS = 16
#: the smallest there is: nobody reads these pages
_LAYOUT = PageLayout(Format(2, 2), 1, 32, PAGE_TOKENS)
_CONTEXT_TOKENS = 1 << 17


class Forest:
    """Conversations behind shared system prompts: each turn goes on from the one before, some are asked anew.

    Stands in for SGLang's scheduler as far as the facts look at it; tree, allocator and events are the real ones.
    """

    def __init__(self, num_pages: int, running: int, turn_tokens: int, turns: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._turn_tokens, self._turns = turn_tokens, turns
        store = PageStore(StoreSize((_LAYOUT,), running, _CONTEXT_TOKENS), num_pages, "cpu", ops.load())
        self.pool = SimpleNamespace(
            store=store, page_size=PAGE_TOKENS, settings=Settings("deltastore", "k4v2"), calibration=None,
            steps=StepCounts([_LAYOUT], [None]),
            get_kv_size_bytes=lambda: store.pages_bytes + store.frames_bytes + store.sinks_bytes,
        )  # fmt: skip
        self.token_to_kv_pool_allocator = PagedTokenToKVPoolAllocator(
            num_pages * PAGE_TOKENS, PAGE_TOKENS, torch.int8, "cpu", self.pool, need_sort=False
        )
        table = SimpleNamespace(
            req_to_token=torch.zeros(running + 2, _CONTEXT_TOKENS, dtype=torch.int32), size=running + 1,
            free_slots=list(range(1, running + 2)),
        )  # fmt: skip
        table.write = lambda where, values: table.req_to_token.__setitem__(where, values.int())
        self.req_to_token_pool = table
        self.tree_cache = DeltaRadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=table, token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=PAGE_TOKENS, tree_components=(ComponentType.FULL,),
            )
        )  # fmt: skip
        self.running_batch, self.last_batch, self.chunked_req = SimpleNamespace(reqs=[]), None, None
        self.recv_from_tokenizer, self.ipc_channels = None, SimpleNamespace(recv_from_rpc=None)
        self.systems = [self._text(2048) for _ in range(16)]
        self.event_us: list[float] = []

    def is_fully_idle(self) -> bool:
        return not self.running_batch.reqs

    def fill(self, spare_pages: int) -> None:
        """Whole conversations, until no more pages are free than these."""
        while self.token_to_kv_pool_allocator.available_size() > spare_pages * PAGE_TOKENS:
            context = list(self._random.choice(self.systems))
            for _ in range(self._turns):
                question = [*context, *self._text(self._turn_tokens // 2)]
                answers = 2 if self._random.random() < 0.1 else 1
                for _ in range(answers):
                    context = self.ask(question, self._text(self._turn_tokens // 2))
                if self.token_to_kv_pool_allocator.available_size() <= spare_pages * PAGE_TOKENS:
                    return

    def ask(self, prompt: list[int], answer: list[int]) -> list[int]:
        """A request from its admission to its end. Returns the context it leaves."""
        req = self.begin(prompt)
        context = [*prompt, *answer]
        self._extend(req, context)
        req.ended = True
        self._checkpoint(req)
        self._leave(req)
        return context

    def begin(self, prompt: list[int]) -> Any:
        """Admit a request; its prompt is in the tree, as behind its prefill."""
        key = RadixKey(array("q", prompt[:-1]), None)
        found = self.tree_cache.match_prefix(MatchPrefixParams(key=key))
        hit, row = found.device_prefix_len, self.req_to_token_pool.free_slots.pop()
        kv = SimpleNamespace(
            req_pool_idx=row, cache_protected_len=hit, cache_inserted_len=0, kv_allocated_len=hit, holds_kv=True
        )
        req = SimpleNamespace(
            rid=str(row), kv=kv, priority=0, session_id=None, kv_rotation_base=None, extra_key=None, cache_salt=None,
            origin_input_ids=array("q", prompt), full_untruncated_fill_ids=array("q", prompt[:hit]), session=None,
            lock=self.tree_cache.lock(found.last_device_node), last_node=found.last_device_node, finished_reason=None,
            cached_tokens=hit, ended=False, lora_id=None, skip_radix_cache_insert=False,
        )  # fmt: skip
        req.finished = lambda: req.ended
        if hit:
            slots = self.tree_cache.path_device_indices(req.last_node)[:hit]
            self.req_to_token_pool.req_to_token[row, :hit] = slots.int()
        self._extend(req, prompt)
        self.running_batch.reqs.append(req)
        self._checkpoint(req)
        return req

    def _extend(self, req: Any, context: list[int]) -> None:
        """Pages for the rest of `context`; whole pages, so that an unfinished one is simply longer."""
        held = -(-req.kv.kv_allocated_len // PAGE_TOKENS) * PAGE_TOKENS
        need = -(-len(context) // PAGE_TOKENS) * PAGE_TOKENS - held
        if need > 0:
            slots = self.token_to_kv_pool_allocator.alloc(need)
            self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, held : held + need] = slots.int()
        req.kv.kv_allocated_len = len(context)
        req.full_untruncated_fill_ids = array("q", context)

    def _checkpoint(self, req: Any) -> None:
        """SGLang's insert with our event behind it; the event alone is timed."""
        event = self.tree_cache._stored

        def timed(stored: Any) -> None:
            started = time.perf_counter()
            event(stored)
            if stored.finished():
                self.event_us.append((time.perf_counter() - started) * 1e6)

        self.tree_cache.__dict__["_stored"] = timed
        self.tree_cache.checkpoint(req, up_to=req.kv.kv_allocated_len)
        del self.tree_cache.__dict__["_stored"]

    def _leave(self, req: Any) -> None:
        kv = req.kv
        held = -(-kv.kv_allocated_len // PAGE_TOKENS) * PAGE_TOKENS
        rest = self.req_to_token_pool.req_to_token[kv.req_pool_idx, kv.cache_protected_len : held]
        if len(rest):
            self.token_to_kv_pool_allocator.free(rest.long())
        self.tree_cache.unlock(req.lock)
        self.req_to_token_pool.free_slots.append(kv.req_pool_idx)
        kv.holds_kv = False
        self.running_batch.reqs.remove(req)

    def _text(self, tokens: int) -> list[int]:
        return [self._random.randrange(50_000) for _ in range(tokens)]
