"""What steps read and encode: counted from lengths on the host, so that counting costs no kernel anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from deltastore_kernels.layout import TILE_TOKENS, PageLayout


class StepCounts:
    """Decode steps, the bytes of stored context that they attended to, and the tokens that all steps have encoded.

    layouts, windows [layers]: a layer's pages, and how many tokens before its own a query sees (None: all).
    A kernel that reads pages once for all requests that share them reads less than is counted here.
    """

    def __init__(self, layouts: Sequence[PageLayout], windows: Sequence[int | None]) -> None:
        self.decode_steps = self.decode_read_bytes = self.encoded_tokens = 0
        #: window -> bytes of a packed and of a raw token over all layers with this window
        self._token_bytes: dict[int | None, tuple[float, float]] = {}
        for layout, window in zip(layouts, windows, strict=True):
            packed, raw = self._token_bytes.get(window, (0.0, 0.0))
            self._token_bytes[window] = (
                packed + layout.page_bytes / layout.page_tokens,
                raw + layout.frame_bytes / TILE_TOKENS,
            )

    def decoded(self, total_tokens: torch.Tensor, new_tokens: int = 1) -> None:
        """A decode step over contexts of total_tokens [B] int, on the host, as many new tokens of each included. Of
        drafts, each reads its context; what they complete is counted, though they may not stay."""
        self.decode_steps += 1
        self.extended(total_tokens - new_tokens, torch.full_like(total_tokens, new_tokens))
        tokens = (total_tokens[:, None] + torch.arange(1 - new_tokens, 1)).flatten().numpy()
        packed_tokens = tokens // TILE_TOKENS * TILE_TOKENS
        for window, (packed_bytes, raw_bytes) in self._token_bytes.items():
            # The first token that the query sees; of packed ones, its whole tile is read.
            first = np.zeros_like(tokens) if window is None else np.maximum(tokens - 1 - window, 0)
            packed = np.maximum(packed_tokens - first // TILE_TOKENS * TILE_TOKENS, 0)
            raw = tokens - np.maximum(packed_tokens, first)
            self.decode_read_bytes += round(int(packed.sum()) * packed_bytes + int(raw.sum()) * raw_bytes)

    def extended(self, prefix_tokens: torch.Tensor, new_tokens: torch.Tensor) -> None:
        """An extend step; both [B] int64 on the host: tokens stored before it, and brought by it."""
        before, brought = prefix_tokens.numpy(), new_tokens.numpy()
        tiles = (before + brought) // TILE_TOKENS - before // TILE_TOKENS
        self.encoded_tokens += int(tiles.sum()) * TILE_TOKENS
