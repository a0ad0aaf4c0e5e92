"""What a server that has started says of itself, once, in its log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from deltastore_kernels.layout import PageLayout

from ..host.dtype import FLOAT32, cpu_dtype, cpu_flags
from ..policy.config import Settings
from ..policy.kernels import describe, is_reference
from ..store.pages import PageStore

logger = logging.getLogger(__name__)


def log_start(settings: Settings, store: PageStore, calibration: str, model_dtype: torch.dtype) -> None:
    """One line; and a warning for what is slow without anybody having asked for it."""
    logger.info("DeltaStore: %s", start_line(settings, store, calibration))
    if settings.kernels == "auto" and is_reference(store.ops):
        logger.warning(
            "DeltaStore: --kv-compress-kernels auto is plain torch here, right but many times slower: no compiled "
            "kernels were built at installation, or none fits this machine; deltastore doctor says how to build them"
        )
    on_cpu = store.pages[0].device.type == "cpu"
    if on_cpu and model_dtype == torch.bfloat16 and cpu_dtype(cpu_flags()) == FLOAT32:
        logger.warning(
            "DeltaStore: the model runs in bfloat16, for which this CPU has no instructions: prompts take many times "
            "as long; add --dtype float32"
        )


def start_line(settings: Settings, store: PageStore, calibration: str) -> str:
    """Tier and formats, kernels, calibration, capacity. fp16's is for all bytes that the store takes, as SGLang itself
    would spend them."""
    resident_bytes = store.pages_bytes + store.frames_bytes + store.sinks_bytes
    windows = ""
    if store.size.has_windows:
        windows = f" ({store.num_window_pages * store.size.page_tokens:,} in layers with windows)"
    drafting = ""
    if draft_bytes := store.size.draft_pool_bytes(store.num_pages):
        drafting = f"; the draft model's own KV beside it {draft_bytes / 1e6:,.1f} MB"
    fp16_tokens = int(resident_bytes * store.size.page_tokens / store.size.stock_page_bytes)
    return (
        f"tier {settings.tier_name} ({formats_of(store)}); kernels {describe(store.ops)}; calibration: {calibration}; "
        f"capacity {store.num_pages * store.size.page_tokens:,} tokens{windows} in {resident_bytes / 1e6:,.1f} MB, "
        f"where fp16 would hold {fp16_tokens:,}{drafting}"
    )


def formats_of(store: PageStore) -> str:
    """K4V2; with bits dealt out over the layers 20 x K3V3, 10 x K4V2; of two levels both: K4V3 to K3V2."""
    return " to ".join(map(_formats, store.size.layouts_by_level))


def _formats(layouts: Sequence[PageLayout]) -> str:
    counts = Counter(str(layout.format) for layout in layouts)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} x {name}" for name, n in sorted(counts.items()))
