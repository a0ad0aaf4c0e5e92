"""How many bytes of the store attention reads: counted from lengths, so that counting costs no kernel anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltastore_kernels.layout import TILE_TOKENS, PageLayout


class DecodeReads:
    """Bytes of stored context that decode steps have attended to, each request's own.

    layouts, windows [layers]: a layer's pages, and how many tokens before its own a query sees (None: all).
    A kernel that reads pages once for all requests that share them reads less than is counted here.
    """

    def __init__(self, layouts: Sequence[PageLayout], windows: Sequence[int | None]) -> None:
        self.steps = 0
        self.bytes = 0
        #: window -> bytes of a packed and of a raw token over all layers with this window
        self._token_bytes: dict[int | None, tuple[float, float]] = {}
        for layout, window in zip(layouts, windows, strict=True):
            packed, raw = self._token_bytes.get(window, (0.0, 0.0))
            self._token_bytes[window] = (
                packed + layout.page_bytes / layout.page_tokens,
                raw + layout.frame_bytes / TILE_TOKENS,
            )

    def count(self, total_tokens: torch.Tensor) -> None:
        """A decode step over contexts of total_tokens [B] int, on the host, the new tokens included."""
        self.steps += 1
        packed_tokens = total_tokens // TILE_TOKENS * TILE_TOKENS
        for window, (packed_bytes, raw_bytes) in self._token_bytes.items():
            # The first token that the query sees; of packed ones, its whole tile is read.
            first = 0 if window is None else (total_tokens - 1 - window).clamp_min(0)
            packed = (packed_tokens - first // TILE_TOKENS * TILE_TOKENS).clamp_min(0)
            raw = total_tokens - torch.maximum(packed_tokens, torch.as_tensor(first))
            self.bytes += round(int(packed.sum()) * packed_bytes + int(raw.sum()) * raw_bytes)
