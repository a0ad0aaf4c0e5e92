"""Packed pages in host memory: SGLang's HiCache over the very bytes that attention reads.

SGLang decides what is written to the host, what is dropped there and what is loaded back; a page is copied as it is.
So it does of a storage behind: there a page goes as its body, and a sequence's first one takes the sink along.

    page   bytes of all layers                                  page_bytes
    sink   its first token, int64, and all layers' raw bytes    first_page_bytes - page_bytes, of a first page
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.host_memory import available_host_memory_bytes
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import (
    StackBuildResult,
    StackStrategy,
    build_pool_entry,
    register_stack_strategy,
)
from sglang.srt.mem_cache.pool_host.base import (
    HICACHE_HOST_MEMORY_RESERVE_BYTES,
    HostKVCache,
    host_memory_budget_scope,
    ranks_per_host,
)
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup
from sglang.srt.mem_cache.unified_cache.component_type import BASE_COMPONENT_TYPE
from sglang.srt.runtime_context import get_memory

from ..policy.config import HOST_MEMORY_LAYOUT
from ..store.host_sinks import HostSinks
from ..store.sealed_page import HEADER_BYTES, StorageCounts
from ..store.sinks import beginning_with
from ..store.size import PAGES_PER_SINK
from . import page_files
from .kv_pool import DeltaKVPool

_TOKEN_BYTES = 8


class DeltaHostPool(HostKVCache):
    """The pages of `pool` on the host: a tensor [pages, page_bytes] uint8 for each layer.

    Slots are SGLang's, token by token; page = slot // page_size on both sides. Raises ValueError for a copy that is
    not of whole pages in order.
    """

    def __init__(self, pool: DeltaKVPool, host_to_device_ratio: float, host_size_gb: float) -> None:
        self.pool = pool
        self.storage_format_tag = pool.identity
        self.storage_counts = StorageCounts()
        #: first tokens of pages that begin a sequence and are about to go to the storage
        self._first_tokens: dict[int, int] = {}
        self.target_layer_num = self.layer_num = pool.layer_num
        super().__init__(
            dtype=torch.uint8,
            device_capacity_tokens=pool.size,
            size_per_token=self.get_size_per_token(),
            start_layer=pool.start_layer,
            end_layer=pool.end_layer,
            host_to_device_ratio=host_to_device_ratio,
            host_size=host_size_gb,
            page_size=pool.page_size,
            layout=HOST_MEMORY_LAYOUT,
            pin_memory=pool.device != "cpu",  # on a CPU it would call CUDA
            device="cpu",
            pool_label="packed",
        )
        self.page_bytes = pool.store.size.page_bytes
        self.sinks: HostSinks | None = None
        if pool.store.sink_table.total:
            self.sinks = HostSinks(pool.store, self.page_num // PAGES_PER_SINK)
        pool.store.sink_table.second_level = self.sinks

    @property
    def first_page_bytes(self) -> int:
        return self.page_bytes + (_TOKEN_BYTES + self.sinks.sink_bytes if self.sinks else 0)

    def clear(self) -> None:
        super().clear()
        self._first_tokens.clear()

    def get_size_per_token(self) -> int:
        """Whole bytes, as SGLang counts: a page is no smaller for it."""
        return -(-self.pool.store.size.page_bytes // self.pool.page_size)

    def init_kv_buffer(self) -> list[torch.Tensor]:
        allocate = ALLOC_MEMORY_FUNCS[torch.device(self.pool.device).type]
        return [
            allocate(
                (self.page_num, layout.page_bytes), dtype=self.dtype, device=self.device, pin_memory=self.pin_memory,
                allocator=self.allocator,
            )
            for layout in self.pool.store.layouts
        ]  # fmt: skip

    def prepare_transfer_indices(self, host_indices: Any, device_indices: Any, _io_backend: str) -> Any:
        """Slots -> pages, both on the host, once for all layers of a transfer."""
        return self._pages(host_indices), self._pages(device_indices)

    def _pages(self, slots: torch.Tensor) -> torch.Tensor:
        slots = slots.cpu().long()
        pages = slots[:: self.page_size] // self.page_size
        whole = pages[:, None] * self.page_size + torch.arange(self.page_size)
        if len(slots) != whole.numel() or not torch.equal(whole.flatten(), slots):
            raise ValueError(
                f"{len(slots)} slots to copy between device and host are not whole pages of {self.page_size} in order"
            )
        return pages

    def load_to_device_per_layer_physical(
        self, _pool: Any, host_pages: Any, device_pages: Any, layer_id: int, _io_backend: str, *, is_draft: bool = False
    ) -> None:
        assert not is_draft, "drafts are refused at the start"
        _copy_rows(self.kv_buffer[layer_id], host_pages, self.pool.store.pages[layer_id], device_pages)

    def load_to_device_per_layer(
        self, pool: Any, host_indices: Any, device_indices: Any, layer_id: int, io_backend: str, *,
        is_draft: bool = False,
    ) -> None:  # fmt: skip
        pages = self.prepare_transfer_indices(host_indices, device_indices, io_backend)
        self.load_to_device_per_layer_physical(pool, *pages, layer_id, io_backend, is_draft=is_draft)

    def backup_from_device_all_layer_physical(
        self, _pool: Any, host_pages: Any, device_pages: Any, _io_backend: str
    ) -> None:
        for device, host in zip(self.pool.store.pages, self.kv_buffer, strict=True):
            _copy_rows(device, device_pages, host, host_pages)

    def backup_from_device_all_layer(self, pool: Any, host_indices: Any, device_indices: Any, io_backend: str) -> None:
        pages = self.prepare_transfer_indices(host_indices, device_indices, io_backend)
        self.backup_from_device_all_layer_physical(pool, *pages, io_backend)

    def begins(self, slot: int, first_token: int) -> None:
        """The page of this slot begins a sequence with this token, and goes to the storage next."""
        self._first_tokens[slot // self.page_size] = first_token

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """A page's body. Called where SGLang writes it to the storage, on a thread of its own."""
        page = int(index) // self.page_size
        parts = [rows[page] for rows in self.kv_buffer]
        first_token = self._first_tokens.pop(page, None)
        if first_token is not None and self.sinks:
            sink = self.sinks.read(beginning_with(first_token))
            if sink is not None:
                parts += [torch.tensor([first_token]).view(torch.uint8), sink]
        return torch.cat(parts)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Room for a sealed page without a sink."""
        return torch.empty(HEADER_BYTES + self.page_bytes, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: Any, data_page: torch.Tensor) -> None:
        """Take a body from the storage. Called on a thread of SGLang's, before anybody is told of the page."""
        page = int(index) // self.page_size
        sizes = [layout.page_bytes for layout in self.pool.store.layouts]
        *parts, sink = data_page.split([*sizes, len(data_page) - self.page_bytes])
        for rows, part in zip(self.kv_buffer, parts, strict=True):
            rows[page] = part
        if len(sink) and self.sinks:
            first_token = int.from_bytes(sink[:_TOKEN_BYTES].numpy().tobytes(), "little")
            self.sinks.put(beginning_with(first_token), sink[_TOKEN_BYTES:])


def _copy_rows(source: torch.Tensor, rows: torch.Tensor, target: torch.Tensor, target_rows: torch.Tensor) -> None:
    """target[target_rows] = source[rows], in as few copies as there are runs; none waits for a device."""
    for first, target_first, count in _runs(rows.numpy(), target_rows.numpy()):
        target[target_first : target_first + count].copy_(source[first : first + count], non_blocking=True)


def _runs(rows: np.ndarray, target_rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first row, first target row, rows) of runs that are consecutive on both sides."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(target_rows) != 1)) + 1
    starts = np.concatenate(([0], breaks, [len(rows)]))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if end > start:
            yield int(rows[start]), int(target_rows[start]), end - start


class DeltaStackStrategy(StackStrategy):
    """What SGLang builds for HiCache where the KV pool is ours."""

    def matches(self, kvcache: Any, components: set[Any]) -> bool:
        return isinstance(kvcache, DeltaKVPool)

    def build(
        self, *, kvcache: Any, params: Any, load_cache_event: Any, storage_backend: Any = None,
        storage_backend_extra_config: Any = None, prefetch_threshold: int = 256, enable_storage_metrics: bool = False,
        **_: Any,
    ) -> StackBuildResult:  # fmt: skip
        memory, layers = get_memory(), kvcache.layer_num
        with host_memory_budget_scope(_budget_bytes()):
            host = DeltaHostPool(kvcache, memory.hicache_ratio, memory.hicache_size)
        group = HostPoolGroup(
            [
                build_pool_entry(
                    name=PoolName.KV, host_pool=host, device_pool=kvcache, is_anchor=True,
                    layer_mapping={layer: layer for layer in range(layers)}, transfer_layer_id_max=layers,
                )
            ]
        )  # fmt: skip
        controller = HybridCacheController(
            params.token_to_kv_pool_allocator,
            group,
            params.page_size,
            params.tp_cache_group,
            load_cache_event=load_cache_event,
            attn_cp_group=params.attn_cp_cache_group,
            attn_tp_group=params.attn_tp_cache_group,
            pp_group=params.pp_cache_group,
            write_policy=memory.hicache_write_policy,
            io_backend=memory.hicache_io_backend,
            prefetch_threshold=prefetch_threshold,
            **_storage(storage_backend, storage_backend_extra_config),
            transfer_layer_id_max=layers,
            enable_storage_metrics=enable_storage_metrics,
            host_memory_mode=memory.hicache_host_memory_mode,
        )
        return StackBuildResult(
            host_pool_group=group,
            cache_controller=controller,
            component_host_pools={BASE_COMPONENT_TYPE: host},
            pools_desc="packed pages",
        )


def _storage(backend: str | None, extra_config: dict[str, Any] | None) -> dict[str, Any]:
    """What a controller is told of a storage, so that it builds ours. Of the model its keys have the fingerprint, not
    the name."""
    if backend is None:
        return {}
    ours = {"backend_name": backend, "module_path": page_files.__name__, "class_name": page_files.PageFiles.__name__}
    return {
        "storage_backend": "dynamic",
        "storage_backend_extra_config": {**(extra_config or {}), **ours, "interface_v1": False},
    }


def _budget_bytes() -> int:
    """Host memory that this rank may take. SGLang leaves 10 GiB to others, which is all of a small machine."""
    reserve_bytes = min(HICACHE_HOST_MEMORY_RESERVE_BYTES, psutil.virtual_memory().total // 10)
    return (available_host_memory_bytes(allow_cgroup_fallback=True) - reserve_bytes) // ranks_per_host()


def register() -> None:
    register_stack_strategy(DeltaStackStrategy())
