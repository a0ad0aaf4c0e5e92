"""Token eviction in the cache: of each page of P tokens, layer l keeps the n_l most important for each KV head.

    position   0 ............ pages_done * P | ........ | ........
    stored in  pages of n_l tokens           | tail     | pending
                                               raw        raw, this step's

n_l is a multiple of 16 and the same for every page, so page i of layer l lies at i * bytes(l) as
without eviction. A page is evicted and encoded once, when it is whole, and attention over it is
done where importance is what attention says; until then its tokens wait raw. Kept tokens are a bag
once RoPE is in, so their positions are not stored, but in layers with a sliding window, one byte each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import CacheLayerMixin

from deltastore_kernels.layout import PageLayout
from deltastore_kernels.packing import to_raw

from ..store.size import StoreSize
from .attention import ATTENTION, mark
from .eviction import ExpectedAttention, Importance, keep_top, kept_tokens, protect
from .sequences import BatchPages
from .support import check_shapes

MAX_PAGE_TOKENS = 256
"""A kept token's place in its page fits a byte."""


@dataclass(frozen=True)
class Eviction:
    """What to keep. shares: of each layer, 0 to 1. The first and last tokens of the context stay as far as fit.

    importance: what tokens receive of a step's queries, or what they are expected to, from themselves alone.
    """

    shares: tuple[float, ...]
    importance: Importance | ExpectedAttention = field(default_factory=Importance)
    first_tokens: int = 4
    last_tokens: int = 32

    @property
    def needs_attention(self) -> bool:
        """Whether tokens must be read before some of them can be dropped."""
        return isinstance(self.importance, Importance)

    def layouts(self, whole: list[PageLayout]) -> list[PageLayout]:
        """Page layouts of the kept tokens, from those of all tokens."""
        page_tokens = whole[0].page_tokens
        if len(self.shares) != len(whole):
            raise ValueError(f"eviction with shares of {len(self.shares)} layers: the model has {len(whole)}")
        if page_tokens > MAX_PAGE_TOKENS:
            raise ValueError(f"eviction with page_tokens={page_tokens}: allowed are at most {MAX_PAGE_TOKENS}")
        kept = kept_tokens(self.shares, page_tokens)
        return [replace(layout, page_tokens=count) for layout, count in zip(whole, kept, strict=True)]


class EvictingLayer(CacheLayerMixin):
    """One layer that keeps a part of its tokens. Its model must attend with `attention.ATTENTION`."""

    supports_early_init = False

    def __init__(
        self, pages: BatchPages, index: int, page_tokens: int, eviction: Eviction, window_tokens: int | None
    ) -> None:
        super().__init__()
        self.pages = pages
        self.index = index
        self.page_tokens = page_tokens
        self.eviction = eviction
        self.has_window = window_tokens is not None
        self.kept_each = pages.layouts[index].page_tokens
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.pages_done = 0
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.shown: torch.Tensor | None = None  # until attention has been told

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        check_shapes(self.pages.layouts[self.index], key_states, value_states)
        self.pages.reserve(len(key_states), 0, key_states.device)
        batch, heads = key_states.shape[:2]
        head_dim = self.pages.layouts[self.index].head_dim
        # [B, H, t, D] raw and rotated, t < P; what they received so far [B, H, t]; each kept token's place [B, H, K]
        self.tail_key_rot = to_raw(key_states.new_empty(batch, heads, 0, head_dim))
        self.tail_value_rot = self.tail_key_rot.clone()
        self.tail_importance = key_states.new_empty(batch, heads, 0, dtype=torch.float32)
        self.places = torch.empty(batch, heads, 0, dtype=torch.uint8, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_states, value_states [B, H, T, D], new -> kept, waiting and new [B, H, kept + t + T, D], same dtype."""
        if self.pending is not None:
            raise RuntimeError(
                f"layer {self.index} was not told what its tokens received; a cache that evicts needs "
                f"model.set_attn_implementation({ATTENTION!r})"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_rot, value_rot = self.pages.read(self.index, self.pages_done * self.kept_each)
        key_rot = torch.cat((key_rot, self.tail_key_rot.float()), dim=2)
        value_rot = torch.cat((value_rot, self.tail_value_rot.float()), dim=2)
        key, value = self.pages.restore(self.index, key_rot, value_rot, key_states.dtype)
        self.shown = self._positions(key_states)
        if isinstance(expected := self.eviction.importance, ExpectedAttention):
            importance = expected.of(self.index, key_states, value_states, self.get_seq_length())
            self._store(key_states, value_states, importance)
        else:
            self.pending = (key_states, value_states)
        return mark(torch.cat((key, key_states), dim=2), self), torch.cat((value, value_states), dim=2)

    def positions(self) -> torch.Tensor | None:
        """Position of each key that `update` returned [B, H, K]."""
        return self.shown

    def _positions(self, new_keys: torch.Tensor) -> torch.Tensor:
        """[B, H, K] of those kept, those waiting, and new_keys [B, H, T, D]."""
        batch, heads, new, _ = new_keys.shape
        stored = self.pages_done * self.page_tokens
        waiting = torch.arange(stored, stored + self.tail_key_rot.shape[2] + new, device=self.places.device)
        if self.has_window:
            page = torch.arange(self.pages_done, device=self.places.device).repeat_interleave(self.kept_each)
            kept = page * self.page_tokens + self.places
        else:
            # Any position of the context will do: the mask hides none of it.
            kept = waiting.new_zeros(batch, heads, self.pages_done * self.kept_each)
        return torch.cat((kept, waiting.expand(batch, heads, -1)), dim=2)

    def attended(self, weights: torch.Tensor, mask: torch.Tensor | None) -> None:
        """weights [B, H, G, Q, K] of the step, by which its tokens and those that wait are judged."""
        self._refuse_padding(mask)
        self.shown = None
        if self.pending is None:
            return
        (key, value), self.pending = self.pending, None
        waiting = self.tail_key_rot.shape[2] + key.shape[2]
        assert isinstance(self.eviction.importance, Importance)
        # A value's norm is what no rotation changes.
        values = torch.cat((self.tail_value_rot.to(value.dtype), value), dim=2)
        received = self.eviction.importance.of(weights[..., -waiting:], values)
        self.tail_importance = self.tail_importance + received[..., : -key.shape[2]]
        self._store(key, value, received[..., -key.shape[2] :])

    def _store(self, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor) -> None:
        """New tokens [B, H, T, D] join the tail, with importance [B, H, T]; whole pages are evicted and encoded."""
        key_rot, value_rot = (
            to_raw(side.unflatten(0, (len(key), -1)).transpose(1, 2))
            for side in self.pages.rotate(self.index, key, value)
        )
        self.tail_key_rot = torch.cat((self.tail_key_rot, key_rot), dim=2)
        self.tail_value_rot = torch.cat((self.tail_value_rot, value_rot), dim=2)
        self.tail_importance = torch.cat((self.tail_importance, importance), dim=2)
        if whole := self.tail_key_rot.shape[2] // self.page_tokens:
            self._evict(whole)

    def _evict(self, whole: int) -> None:
        """Choose among the tail's first `whole` pages, encode what stays, drop the rest."""
        end = whole * self.page_tokens
        first = max(self.eviction.first_tokens - self.pages_done * self.page_tokens, 0)
        importance = protect(self.tail_importance, first, self.eviction.last_tokens)[:, :, :end]
        by_page = importance.unflatten(2, (whole, self.page_tokens))
        place = keep_top(by_page, self.kept_each)  # [B, H, whole, n]
        chosen = (torch.arange(whole, device=place.device)[:, None] * self.page_tokens + place).flatten(2)
        kept = [_gather(side, chosen) for side in (self.tail_key_rot, self.tail_value_rot)]
        batch, count = len(place), whole * self.kept_each
        self.pages.reserve(batch, self.pages_done + whole, place.device)
        rows = [side.transpose(1, 2).flatten(0, 1) for side in kept]
        self.pages.write(self.index, *rows, self.pages_done * self.kept_each, count)
        self.pages_done += whole
        if self.has_window:
            self.places = torch.cat((self.places, place.flatten(2).to(torch.uint8)), dim=2)
        # Clones: a view would hold the evicted tokens' memory.
        self.tail_key_rot = self.tail_key_rot[:, :, end:].clone()
        self.tail_value_rot = self.tail_value_rot[:, :, end:].clone()
        self.tail_importance = self.tail_importance[:, :, end:].clone()

    def _refuse_padding(self, mask: torch.Tensor | None) -> None:
        # The last query of a layer without a window sees every token, unless the mask hides padding.
        if mask is not None and not self.has_window and bool((mask[:, :, -1] < 0).any()):
            raise ValueError("a padded batch in a cache that evicts: padding would count as context; use one length")

    def select(self, rows: torch.Tensor) -> None:
        """Keep these sequences, in this order (the pages move on their own)."""
        if self.is_initialized:
            for name in ("tail_key_rot", "tail_value_rot", "tail_importance", "places"):
                setattr(self, name, getattr(self, name)[rows])

    @property
    def own_bytes(self) -> int:
        """Bytes held beside the pages: the raw tail and its importance, places in windowed layers."""
        if not self.is_initialized:
            return 0
        held = (self.tail_key_rot, self.tail_value_rot, self.tail_importance, self.places)
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    @property
    def bytes_in_use(self) -> int:
        layout = self.pages.layouts[self.index]
        sink_bytes = StoreSize((layout,), num_frames=0, context_tokens=0).sink_bytes if self.pages_done else 0
        return self.pages.batch * (self.pages_done * layout.page_bytes + sink_bytes) + self.own_bytes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing were evicted: the attention picks the columns of `positions`."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        waiting = self.tail_key_rot.shape[2] if self.is_initialized else 0
        return self.pages_done * self.page_tokens + waiting

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"DeltaStoreCache.crop({tokens_to_remove}): an evicted token cannot be taken back; allowed is 0; "
                "generate without an assistant model, or start a new cache"
            )


def _gather(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D], positions [B, H, K] -> [B, H, K, D]."""
    return x.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
