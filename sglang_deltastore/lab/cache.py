"""DeltaStoreCache: the server's packed pages as a cache for transformers.

    model.generate(**inputs, past_key_values=DeltaStoreCache(model.config, tier="k4v2"))

Keys and values are stored by the same code and in the same bytes as in the server. What attention
reads follows the server too:

    several new tokens   the stored context decoded, the new tokens themselves raw; then they are stored
    one new token        it is stored, then all is read from the store

Every step decodes the whole context: this cache saves memory and measures quality, the server is
what saves time.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from deltastore_kernels.layout import PageLayout

from ..policy.calibration import Calibration, resolve
from ..policy.tiers import DEFAULT_TIER, TIERS, Tier
from ..policy.tiers import tier as tier_named
from ..store.pages import PageStore
from .evicting import EvictingLayer, Eviction
from .sequences import BatchPages
from .support import attention_shape, check_shapes

DEFAULT_PAGE_TOKENS = 16


class StoredLayer(CacheLayerMixin):
    """One layer's tokens in the shared pages."""

    supports_early_init = False  # the store is made with the first tokens, which bring batch and device

    def __init__(self, pages: BatchPages, index: int, quantize_at_once: bool) -> None:
        super().__init__()
        self.pages = pages
        self.index = index
        self.quantize_at_once = quantize_at_once
        self.tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        check_shapes(self.pages.layouts[self.index], key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states [B, H, T, D], new -> what attention reads, [B, H, stored + T, D], same dtype."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, new, _ = key_states.shape
        stored, self.tokens = self.tokens, self.tokens + new
        page_tokens = self.pages.layouts[self.index].page_tokens
        self.pages.reserve(batch, -(-self.tokens // page_tokens), key_states.device)
        rotated = self.pages.rotate(self.index, key_states, value_states)
        if self.quantize_at_once or (new == 1 and stored):
            self.pages.write(self.index, *rotated, stored, new)
            return self._read(self.tokens, key_states.dtype)
        if not stored:
            context = (key_states, value_states)
        else:
            # Before the write, which may turn the frame that is read here into a packed tile.
            old = self._read(stored, key_states.dtype)
            context = tuple(torch.cat(pair, dim=2) for pair in zip(old, (key_states, value_states), strict=True))
        self.pages.write(self.index, *rotated, stored, new)
        return context

    def _read(self, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rotated = self.pages.read(self.index, tokens, round_trip_rest=self.quantize_at_once)
        return self.pages.restore(self.index, *rotated, dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens are kept; in a layer with a sliding window the mask hides what is beyond it."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.tokens, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"DeltaStoreCache.crop({tokens_to_remove}): a packed tile cannot be taken back; allowed is 0; "
                "generate without an assistant model, or start a new cache"
            )


class DeltaStoreCache(Cache):
    """A transformers cache of packed pages.

    config            the model's; raises ValueError for attention that pages cannot hold
    tier              a tier's name, or a Tier; of one with levels, all that is stored has been finer before
    page_tokens       tokens of a page, a multiple of 16
    quantize_at_once  every token reads every token as the codec leaves it, itself too, also in
                      tiles that are not finished: for measuring, no server does it
    eviction          keep only a part of each page's tokens; the model then needs
                      `model.set_attn_implementation(deltastore's ATTENTION)`
    calibration       the model's, or what `--kv-compress-calibration` takes: "auto", "none", a file. A model that
                      was not loaded from a folder has no calibration in the user's cache, and takes no file; raises
                      CalibrationError for a file that is not the model's
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        tier: str | Tier = DEFAULT_TIER,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        *,
        quantize_at_once: bool = False,
        eviction: Eviction | None = None,
        calibration: Calibration | str | Path | None = None,
        kernels: str = "auto",
    ) -> None:
        shape = attention_shape(config)
        chosen = tier if isinstance(tier, Tier) else tier_named(tier)
        if isinstance(calibration, str | Path):
            calibration = resolve(str(calibration), _folder(config))
        if calibration:
            calibration.check_shape([(heads, shape.head_dim) for heads in shape.heads_by_layer])

        def layouts_of(level: Tier) -> list[PageLayout]:
            formats = calibration.formats_of(level) if isinstance(calibration, Calibration) else None
            return level.layouts(shape.heads_by_layer, shape.head_dim, page_tokens, formats)

        *finer, layouts = [layouts_of(TIERS[name]) for name in chosen.levels] or [layouts_of(chosen)]
        if eviction:
            if quantize_at_once:
                raise ValueError("quantize_at_once with eviction: what is evicted follows from a step's attention")
            layouts = eviction.layouts(layouts)
        self.page_tokens = page_tokens
        key_bases = calibration.layers if calibration else None
        self.pages = BatchPages(tuple(layouts), kernels, key_bases, tuple(next(iter(finer), ())))
        super().__init__(
            layers=[
                EvictingLayer(self.pages, index, page_tokens, eviction, shape.windows[index])
                if eviction
                else StoredLayer(self.pages, index, quantize_at_once)
                for index in range(len(layouts))
            ]
        )

    @property
    def store(self) -> PageStore | None:
        """The page store; None before the first tokens."""
        return self.pages.store

    def resident_bytes(self) -> int:
        """Bytes of every tensor this cache holds: pages (also free ones), frames, maps."""
        return self.pages.resident_bytes + sum(getattr(layer, "own_bytes", 0) for layer in self.layers)

    def raw_bytes(self) -> int:
        """What the tokens seen so far would take as 16-bit floats."""
        values = sum(layout.num_kv_heads * (layout.key_dim + layout.value_dim) for layout in self.pages.layouts)
        return self.pages.batch * self.get_seq_length() * values * 2

    def ratio(self) -> float:
        """raw_bytes / resident_bytes. Frames and free pages weigh much while the context is short."""
        return self.raw_bytes() / self.resident_bytes()

    def bytes_in_use(self) -> int:
        """Bytes that hold these tokens: their pages, the frames while a tile is unfinished, maps."""
        if any(isinstance(layer, EvictingLayer) for layer in self.layers):
            return sum(layer.bytes_in_use for layer in self.layers)
        return self.pages.bytes_in_use(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.pages.store = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: sequence b goes on from what sequence beam_idx[b] holds."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.pages.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, EvictingLayer):
                layer.select(indices)
        self.pages.select(indices)


def _folder(config: PreTrainedConfig) -> Path | None:
    """Where the model was loaded from, on this machine; None where it was not, or is no longer."""
    name = getattr(config, "_name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
