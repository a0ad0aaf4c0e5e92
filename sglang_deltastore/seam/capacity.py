"""How many tokens the same memory holds: SGLang's capacity, computed from our byte sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..policy.config import FRAME_BUDGET_SHARE, MIN_FRAMES
from ..policy.refusals import Refused
from ..store.size import StoreSize
from .deployment import deployment_of
from .flags import settings_of


def affordable_frames(store_bytes: int, size: StoreSize, requested: int | None) -> int:
    """Frames for `requested` running requests, or as many as their share of the store allows."""
    share = int(store_bytes * FRAME_BUDGET_SHARE) // size.frame_bytes
    return requested or max(share, MIN_FRAMES)


def configurator(default: Any, kvc: Any) -> Any:
    """AFTER create_memory_pool_configurator."""
    if not settings_of(kvc.server_args).enabled:
        return default

    from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig, MemoryPoolConfigurator

    size, requested = deployment_of(kvc).store_size(num_frames=0), kvc.server_args.max_running_requests

    class DeltaPoolConfigurator(MemoryPoolConfigurator):
        """Tokens from bytes: pages, padding page, frames and scratch all come out of the budget."""

        def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> Any:
            frames = affordable_frames(available_bytes, size, requested)
            frames_bytes = frames * size.frame_bytes
            if frames_bytes > available_bytes // 2:
                raise Refused(
                    f"--kv-compress deltastore: {frames} running requests need {frames_bytes} bytes for their "
                    f"unfinished tiles; allowed is half of the {available_bytes} bytes for KV; lower "
                    "--max-running-requests or raise --mem-fraction-static"
                )
            return self._config(replace(size, num_frames=frames).tokens_within(available_bytes), page_size)

        def calculate_pool_sizes_from_max_tokens(self, max_total_num_tokens: int, page_size: int) -> Any:
            return self._config(max_total_num_tokens, page_size)

        def finalize_with_max_running_requests(self, config: Any) -> Any:
            """A running request needs a frame; the tokens left no more room than was counted above."""
            store_bytes = int(config.max_total_num_tokens * size.bytes_per_token)
            frames = affordable_frames(store_bytes, size, requested)
            config.max_running_requests = min(config.max_running_requests, frames)
            return config

        @classmethod
        def _config(cls, tokens: int, page_size: int) -> Any:
            pages = tokens // page_size
            if not size.has_windows:
                return MemoryPoolConfig(max_total_num_tokens=pages * page_size)
            window_tokens = size.window_pages(pages) * page_size
            cls.validate_swa_pool_size(window_tokens, kvc.sliding_window_size, page_size)
            return MemoryPoolConfig(
                max_total_num_tokens=pages * page_size,
                full_max_total_num_tokens=pages * page_size,
                swa_max_total_num_tokens=window_tokens,
            )

    return DeltaPoolConfigurator()
