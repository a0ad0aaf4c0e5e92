"""The page store behind SGLang's KV pool interface."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, KVCache

from ..observe.drift import Drift
from ..observe.reads import StepCounts
from ..policy.precision import first_level
from ..store.pages import PageStore
from . import drafts
from .deployment import deployment_of, page_identity
from .flags import settings_of


class DeltaKVPool(KVCache):
    """SGLang's view of the store: slots, sizes, and no float buffers.

    Keys and values enter through the attention backend, which knows the requests they belong to;
    whoever asks for a float buffer is an unsupported feature, and is told so.
    """

    drift: Drift | None = None
    """Of a calibrated store, once the server is ready."""

    def __init__(self, kvc: Any, size_tokens: int, num_frames: int) -> None:
        deployment = deployment_of(kvc)
        super().__init__(
            size=size_tokens,
            page_size=kvc.pool_page_size,
            # The truth: bytes. Where SGLang reads bfloat16 here, models write keys and values into buffers themselves.
            dtype=torch.uint8,
            layer_num=len(deployment.layouts),
            device=kvc.device,
            enable_memory_saver=False,
            start_layer=kvc.layer_info.start_layer,
            end_layer=kvc.layer_info.end_layer,
        )
        #: layer_id -> its place in the store: models may have layers without a KV cache between those with one
        self.layer_index = {layer_id: index for index, layer_id in enumerate(deployment.layer_ids)}
        self.settings, self.calibration = deployment.settings, deployment.calibration
        self.calibration_source = deployment.calibration_source
        #: None: no storage outlives this process
        self.identity = page_identity(kvc, deployment) if kvc.server_args.hicache_storage_backend else None
        self.store = PageStore(
            size=deployment.store_size(num_frames),
            num_pages=size_tokens // self.page_size,
            device=self.device,
            ops=deployment.kernels,
            key_bases=self.calibration and self.calibration.layers,
            first_level=first_level,
        )
        self.steps = StepCounts(deployment.layouts, deployment.windows)
        self._finalize_allocation_log(size_tokens)

    def get_kv_size_bytes(self) -> int:
        return self.store.pages_bytes + self.store.frames_bytes + self.store.sinks_bytes

    def wait_for_layer(self, layer: int) -> None:
        """Before anything reads this layer, counted from 0: pages that come back from host memory have arrived."""
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(layer)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Of accepted drafts, from the slots that they had to those that they stay in: the same, as drafts are a chain.
        Both [drafts] int64."""
        if tgt_loc.device.type == "cpu" and not torch.equal(tgt_loc, src_loc):
            raise AssertionError(f"drafts that are no chain were accepted: {src_loc.tolist()} to {tgt_loc.tolist()}")

    def _no_floats(self) -> Any:
        raise TypeError(
            "DeltaStore keeps KV packed and has no float buffers; an SGLang feature that reads or writes "
            "them cannot be served together with --kv-compress deltastore"
        )

    def get_key_buffer(self, layer_id: int) -> Any:
        self._no_floats()

    def get_value_buffer(self, layer_id: int) -> Any:
        self._no_floats()

    def get_kv_buffer(self, layer_id: int) -> Any:
        self._no_floats()

    def set_kv_buffer(self, *_args: Any, **_kwargs: Any) -> None:
        self._no_floats()


class DeltaWindowKVPool(DeltaKVPool, BaseSWAKVPool):
    """Ours where SGLang frees what lies behind windows. Its allocator deals out slots of both parts of the store, and
    keeps the map between them; slots elsewhere are those of the first part."""

    def register_mapping(self, full_to_swa_index_mapping: torch.Tensor) -> None:
        """[slots + a page + 1] int64, once there is an allocator; it goes on changing."""
        self.store.window_slots = full_to_swa_index_mapping

    @property
    def full_to_swa_index_mapping(self) -> torch.Tensor | None:
        return self.store.window_slots

    def translate_loc_from_full_to_swa(self, kv_indices: torch.Tensor) -> torch.Tensor:
        """Slots of the first part, any shape -> the same tokens' slots in the window part; 0: freed."""
        slots: torch.Tensor = self.store.window_slots[kv_indices]
        return slots

    def get_state_buf_infos(self) -> Any:
        self._no_floats()


class DeltaHybridKVPool(HybridLinearKVPool):
    """Ours for a hybrid's attention layers, beside SGLang's states of its other layers."""

    def __init__(self, kvc: Any, full_kv_pool: DeltaKVPool, mamba_pool: Any) -> None:
        super().__init__(
            size=full_kv_pool.size,
            dtype=full_kv_pool.dtype,
            page_size=full_kv_pool.page_size,
            head_num=full_kv_pool.store.layouts[0].num_kv_heads,
            head_dim=full_kv_pool.store.layouts[0].head_dim,
            full_attention_layer_ids=list(full_kv_pool.layer_index),
            device=full_kv_pool.device,
            mamba_pool=mamba_pool,
            start_layer=kvc.layer_info.start_layer,
            full_kv_pool=full_kv_pool,
        )

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Of keys and of values, as SGLang's hybrid pools count: a page has both, and they are not told apart."""
        return self.full_kv_pool.get_kv_size_bytes(), 0


def packed_pool(pool: Any) -> Any:
    """SGLang's KV pool, or within a hybrid's pool the one of its attention layers."""
    return getattr(pool, "full_kv_pool", pool)


def build_pool(original: Any, kvc: Any, *, sizes: Any, req_to_token_pool: Any, **kwargs: Any) -> Any:
    """AROUND KVCacheConfigurator._build_token_to_kv_pool. A draft model keeps SGLang's own pool."""
    if not settings_of(kvc.server_args).enabled or kvc.is_draft_worker:
        return original(kvc, sizes=sizes, req_to_token_pool=req_to_token_pool, **kwargs)
    if deployment_of(kvc).draft_tokens:
        drafts.register()
    pool_class = DeltaWindowKVPool if kvc.is_hybrid_swa else DeltaKVPool
    pool = pool_class(kvc, sizes.max_total_num_tokens, num_frames=req_to_token_pool.size)
    return DeltaHybridKVPool(kvc, pool, req_to_token_pool.mamba_pool) if kvc.mambaish_config else pool
