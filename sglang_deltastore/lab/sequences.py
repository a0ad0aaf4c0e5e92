"""A page store for a batch of sequences that grows: what DeltaStoreCache holds.

    page i of sequence b   store page 1 + i * B + b        frame and sink of sequence b   store frame, sink b + 1

Page 0, frame 0 and sink 0 belong to nobody, as in the server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deltastore_kernels import ops
from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.context import LayerStore
from deltastore_kernels.layout import TILE_TOKENS, PageLayout
from deltastore_kernels.ops.store_tokens.reference import store_with

from ..store.pages import PageStore
from ..store.size import StoreSize
from ..store.writes import plan_writes

GROWTH_SHARE = 1 / 8
"""A store that must grow takes at least so much more than it has, lest every page copies all."""

#: a store's tensors, by layer; those after the pages have a row for each sequence
_TENSORS = ("pages", "frame_key_rot", "frame_value_rot", "sink_key_rot", "sink_value_rot")


class BatchPages:
    """Packed pages and frames of B sequences of one length, for all layers.

    `layouts[l].page_tokens` may differ from layer to layer (eviction); the number of pages of a
    sequence is the same in all. With `finer` layouts tiles are encoded in those first, and again from there, as pages
    are that give up bits (store/levels.py).
    """

    def __init__(
        self,
        layouts: tuple[PageLayout, ...],
        kernels: str,
        key_bases: Sequence[KeyBasis] | None = None,
        finer: tuple[PageLayout, ...] = (),
    ) -> None:
        self.layouts = layouts
        self.finer = finer
        self.kernels = kernels
        self.key_bases = key_bases
        self.store: PageStore | None = None
        self.batch = 0
        self.pages_each = 0  # allocated for each sequence

    def __getstate__(self) -> dict[str, object]:
        """For pickle and copy: the store as its tensors. The rest of it, operations and callbacks, is made anew."""
        state = vars(self).copy()
        store = state.pop("store")
        if store is not None:
            state["held"] = {name: getattr(store, name) for name in _TENSORS}
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        held = state.pop("held", None)
        vars(self).update(state, store=None)
        if held is None:
            return
        self.store = self._new_store(held["pages"][0].device.type)
        for name in _TENSORS:
            for ours, theirs in zip(getattr(self.store, name), held[name], strict=True):
                ours.copy_(theirs)

    def reserve(self, batch: int, pages_each: int, device: torch.device) -> None:
        """Make room for so many pages of each sequence, in every layer."""
        if self.store is None:
            self.batch, self.pages_each = batch, pages_each
            self.store = self._new_store(device.type)
        if batch != self.batch:
            raise ValueError(
                f"a batch of {batch} sequences; this cache holds {self.batch}; use one cache for each batch, "
                "batch_select_indices or batch_repeat_interleave"
            )
        if pages_each > self.pages_each:
            self._move(torch.arange(batch), max(pages_each, int(self.pages_each * (1 + GROWTH_SHARE)) + 1))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these sequences, in this order; one may come more than once."""
        if self.store is not None:
            self._move(rows.cpu(), self.pages_each)

    def page_table(self, pages_each: int) -> torch.Tensor:
        """[B, pages_each] int64."""
        return 1 + torch.arange(pages_each) * self.batch + torch.arange(self.batch)[:, None]

    def basis(self, layer: int) -> Basis:
        """Into the layer's stored basis and back."""
        assert self.store is not None, "reserve comes first"
        return self.store.bases[layer]

    def rotate(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [B, H, T, D] -> key_rot, value_rot [B * T, H, D], in the order `write` wants."""
        basis = self.basis(layer)
        return basis.rotate_key(_rows(key)), basis.rotate_value(_rows(value))

    def restore(
        self, layer: int, key_rot: torch.Tensor, value_rot: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key_rot, value_rot [B, H, T, D] -> key, value [B, H, T, D] in the model's basis, in `dtype`."""
        basis, batch = self.basis(layer), len(key_rot)
        key, value = basis.restore_key(_rows(key_rot)), basis.restore_value(_rows(value_rot))
        return _from_rows(key, batch).to(dtype), _from_rows(value, batch).to(dtype)

    def write(self, layer: int, key_rot: torch.Tensor, value_rot: torch.Tensor, stored: int, new: int) -> None:
        """Store `new` tokens of each sequence behind the `stored` ones: key_rot, value_rot [B * new, H, D]."""
        assert self.store is not None, "reserve comes first"
        page_tokens = self.layouts[layer].page_tokens
        each = torch.full((self.batch,), stored)
        plan = plan_writes(
            prefix_tokens=each,
            new_tokens=torch.full_like(each, new),
            frame_ids=self._own,
            page_table=self.page_table(-(-(stored + new) // page_tokens)),
            page_tokens=page_tokens,
            sink_ids=self._own if not stored else torch.zeros_like(each),
        )
        if self.finer:
            encode = partial(_encode_again, self.store.ops, self.finer[layer])
            store_with(encode, key_rot, value_rot, plan, self.store.stored[layer])
        else:
            self.store.write(layer, key_rot, value_rot, plan)

    def read(self, layer: int, tokens: int, round_trip_rest: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `tokens` tokens of every sequence, rotated: key_rot, value_rot [B, H, tokens, D] float32.

        round_trip_rest: the unfinished tile is read as encoding would leave it. It is padded to a
        tile by repeating its last token, which neither raises the tile's scale nor is read back,
        and encoded where the whole tile will go, which overwrites it.
        """
        assert self.store is not None, "reserve comes first"
        layout, rest = self.layouts[layer], tokens % TILE_TOKENS
        if rest and round_trip_rest:
            lanes = torch.arange(TILE_TOKENS).clamp_max(rest - 1)
            padded = [_rows(side[layer][1:, :, lanes]) for side in self._frames]
            self.write(layer, *padded, tokens - rest, TILE_TOKENS)
            key_rot, value_rot = self.read(layer, tokens - rest + TILE_TOKENS)
            return key_rot[:, :, :tokens], value_rot[:, :, :tokens]
        pages_each = -(-(tokens - rest) // layout.page_tokens)
        decoded = self.store.ops.decode(self.store.pages[layer], self.page_table(pages_each).flatten(), layout)
        sides = [_sequences(side, self.batch)[:, :, : tokens - rest] for side in decoded]
        stored = self.store.stored[layer]
        if pages_each and stored.sink_tokens:
            for side, raw in zip(sides, (stored.sink_key_rot, stored.sink_value_rot), strict=True):
                side[:, :, : stored.sink_tokens] = raw[self._own].float()
        if not rest:
            return sides[0], sides[1]
        waiting = [side[layer][1:, :, :rest].float() for side in self._frames]
        key_rot, value_rot = (torch.cat(parts, dim=2) for parts in zip(sides, waiting, strict=True))
        return key_rot, value_rot

    def bytes_in_use(self, tokens: int) -> int:
        """Bytes of the pages that hold `tokens` tokens of each sequence, all layers, of its sink, and of the frames of
        a rest."""
        whole = tokens // TILE_TOKENS * TILE_TOKENS
        pages = sum(-(-whole // layout.page_tokens) * layout.page_bytes for layout in self.layouts)
        frames = sum(layout.frame_bytes for layout in self.layouts) if tokens % TILE_TOKENS else 0
        sinks = StoreSize(self.layouts, num_frames=0, context_tokens=0).sink_bytes if whole else 0
        return self.batch * (pages + frames + sinks)

    @property
    def resident_bytes(self) -> int:
        """Bytes of every tensor that the store holds, whatever of it is in use."""
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(self.store)}.values())

    @property
    def _own(self) -> torch.Tensor:
        """[B] int64: the sequences' frames, and their sinks."""
        return 1 + torch.arange(self.batch)

    @property
    def _frames(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        assert self.store is not None, "reserve comes first"
        return self.store.frame_key_rot, self.store.frame_value_rot

    def _new_store(self, device: str) -> PageStore:
        size = StoreSize(self.layouts, num_frames=self.batch, context_tokens=0, pages_per_sink=math.inf)
        return PageStore(size, self.batch * self.pages_each, device, ops.load(self.kernels, device), self.key_bases)

    def _move(self, rows: torch.Tensor, pages_each: int) -> None:
        """Into a new store, of other size or with other sequences."""
        old, old_batch, copied = self.store, self.batch, self.pages_each
        assert old is not None, "nothing to move"
        self.batch, self.pages_each = len(rows), pages_each
        self.store = self._new_store(old.pages[0].device.type)
        for layer, pages in enumerate(old.pages):
            by_page = self.store.pages[layer][1:].unflatten(0, (pages_each, self.batch))
            by_page[:copied] = pages[1:].unflatten(0, (copied, old_batch))[:, rows]
            for name in _TENSORS[1:]:
                new, theirs = getattr(self.store, name)[layer], getattr(old, name)[layer]
                if len(theirs):  # raw layers have no sinks
                    new[self._own] = theirs[1 + rows]


def _encode_again(
    kernels: ops.Operations, finer: PageLayout, key_rot: torch.Tensor, value_rot: torch.Tensor, *where: Any
) -> None:
    """As `encode`, of what tiles [N, H, 16, D] are once they have been encoded in a finer layout; `where`: its other
    arguments, the last of which is the keys' shaping."""
    one_tile, tiles = replace(finer, page_tokens=TILE_TOKENS), torch.arange(len(key_rot), device=key_rot.device)
    pages = torch.empty(len(tiles), one_tile.page_bytes, dtype=torch.uint8, device=key_rot.device)
    kernels.encode(key_rot, value_rot, tiles, torch.zeros_like(tiles), pages, one_tile, where[-1])
    kernels.encode(*kernels.decode(pages, tiles, one_tile), *where)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B * T, H, D]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _from_rows(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[B * T, H, D] -> [B, H, T, D]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _sequences(pages: torch.Tensor, batch: int) -> torch.Tensor:
    """[B * pages, H, P, D] -> [B, H, pages * P, D]."""
    return pages.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def tensors_of(owner: object) -> Iterator[torch.Tensor]:
    """Every tensor that `owner` holds, in its attributes and in lists, tuples and dicts of them.

    Operations and bases hold constants of the process and the model; they are not counted, and what a LayerStore shows
    of a store the store itself has.
    """
    if isinstance(owner, torch.Tensor):
        yield owner
    elif isinstance(owner, list | tuple):
        for part in owner:
            yield from tensors_of(part)
    elif isinstance(owner, dict):
        yield from tensors_of(list(owner.values()))
    elif not isinstance(owner, ops.Loaded | Basis | LayerStore | type) and hasattr(owner, "__dict__"):
        yield from tensors_of(vars(owner))
