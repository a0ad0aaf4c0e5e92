"""The page store: every layer's packed pages and frames, and the one way into them.

    page store   pages[layer]            [pages, page_bytes] uint8    whole tiles, packed
                 frame_key_rot[layer]    [frames, H, 16, D] float16   a running request's last,
                 frame_value_rot[layer]  [frames, H, 16, D] float16   unfinished tile

                 sink_key_rot[layer]    [sinks, H, S, D] float16      sequences' first tokens, raw as well:
                 sink_value_rot[layer]  [sinks, H, S, D] float16      attention sinks
                 sink_of_frame          [frames] int64                a running request's sink, or NO_SINK

Page i of layer l lies at i * page_bytes(l). Page 0, frame 0 and sink 0 belong to nobody: SGLang's padding
rows point there. A frame's index is the request's row in SGLang's request table, so frames need no
allocator: a request has at most one unfinished tile, and a prefix hit always ends on a page boundary.

Where steps bring drafts, which may not stay, a request has two frames, for tiles of even and of odd number: behind
`frame_stride` frames lie the second ones of all requests. What drafts complete is written to its page, and their tokens
to the frames all the same: where they do not stay, nobody reads the tile, and what comes in their place overwrites it.

Where SGLang frees what lies behind windows, layers with a window are a second part of the store: as many frames and
sinks, pages of their own. SGLang's slots number the pages of the first part; `window_slots` says which slot of the
second one belongs to each.

Where pages are of two levels (levels.py), SGLang's slots number pages, and `rows_of` says where each lies: a layer's
`stored` has two kinds of them in the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltastore_kernels.basis import Basis, KeyBasis
from deltastore_kernels.context import CoarsePages, LayerStore
from deltastore_kernels.layout import TILE_TOKENS
from deltastore_kernels.ops import Operations
from deltastore_kernels.packing import RAW_DTYPE
from deltastore_kernels.token_writes import TokenWrites

from .levels import COARSE, FINE, FirstLevel, Levels, most_fine
from .sinks import NO_SINK, SinkTable
from .size import SINK_TOKENS, StoreSize


class PageStore:
    """The tensors of a store, and `write`, the only way to change them.

    `num_pages` counts the pages that requests may own, numbered 1 .. num_pages, `num_window_pages` those of the window
    part; `key_bases` are the layers' calibrations, where there are any; `first_level` says at which of two levels pages
    begin, where the size has two.
    """

    def __init__(
        self,
        size: StoreSize,
        num_pages: int,
        device: str,
        ops: Operations,
        key_bases: Sequence[KeyBasis | None] | None = None,
        first_level: FirstLevel | None = None,
    ) -> None:
        key_bases = key_bases or [None] * len(size.layouts)
        self.size = size
        self.bases = [
            Basis(ops, basis and basis.to(device), layout)
            for basis, layout in zip(key_bases, size.layouts, strict=True)
        ]
        self.layouts = size.layouts
        self.num_pages, self.num_window_pages = num_pages, size.window_pages(num_pages)
        #: of each layer, its part of the store: 0, or 1 with a window behind which pages are freed
        self.part_of = tuple(map(int, size.window_layers)) or (0,) * len(size.layouts)
        #: slot -> its token's slot in the window part, 0: it has none (any more). SGLang's own, which it changes
        self.window_slots: torch.Tensor | None = None
        self.ops = ops
        self.sink_table = SinkTable(size.sinks(num_pages))
        self.sink_of_frame = torch.full((size.num_frames + 1,), NO_SINK, device=device)
        # Left unset: no byte is read before `write` has set it, and untouched memory costs nothing.
        self.pages = [
            torch.empty(count + 1, layout.page_bytes, dtype=torch.uint8, device=device)
            for layout, count in zip(self.layouts, self._page_counts(), strict=True)
        ]
        self._coarse: list[CoarsePages] = []
        self.levels: Levels | None = None
        if size.fine_layouts:
            assert first_level, "pages of two levels begin at one of them"
            self.layouts = size.fine_layouts
            self.pages, self._coarse = _in_same_bytes(size, num_pages, device)
            self.levels = Levels(num_pages, size.level_bytes, self, first_level)
        self.sink_key_rot, self.sink_value_rot = (
            [
                torch.zeros(
                    0 if layout.format.is_raw else self.sink_table.total + 1,
                    layout.num_kv_heads, SINK_TOKENS, layout.head_dim, dtype=RAW_DTYPE, device=device,
                )
                for layout in self.layouts
            ]
            for _ in ("key", "value")
        )  # fmt: skip
        self.frame_key_rot, self.frame_value_rot = (
            [
                torch.zeros(
                    size.frames_each * (size.num_frames + 1), layout.num_kv_heads, TILE_TOKENS, layout.head_dim,
                    dtype=RAW_DTYPE, device=device,
                )
                for layout in self.layouts
            ]
            for _ in ("key", "value")
        )  # fmt: skip
        beside: Sequence[CoarsePages | None] = self._coarse or [None] * len(self.layouts)
        self.stored = [
            LayerStore(layout, pages, frame_key, frame_value, sink_key, sink_value, basis.key_shaping, coarse)
            for layout, pages, frame_key, frame_value, sink_key, sink_value, basis, coarse in zip(
                self.layouts, self.pages, self.frame_key_rot, self.frame_value_rot, self.sink_key_rot,
                self.sink_value_rot, self.bases, beside, strict=True,
            )
        ]  # fmt: skip
        #: of each part, the layer against which a step's indices are checked: all have the same number of pages, frames
        #: and, but for raw ones, sinks
        self.bounds = tuple(self._bounds_of(part) for part in sorted(set(self.part_of)))

    def _page_counts(self) -> list[int]:
        return [(self.num_pages, self.num_window_pages)[part] for part in self.part_of]

    def _bounds_of(self, part: int) -> LayerStore:
        layers = [layer for layer, its_part in zip(self.stored, self.part_of, strict=True) if its_part == part]
        return next((layer for layer in layers if layer.sink_tokens), layers[0])

    def window_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages of the first part, or NO_PAGE, any shape -> the same tokens' in the window part; 0: freed."""
        assert self.window_slots is not None, "the window part has pages once SGLang has an allocator for it"
        slots = self.window_slots[pages.clamp_min(0) * self.size.page_tokens]
        return torch.where(pages < 0, pages, slots // self.size.page_tokens)

    def rows_of(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages of the first part, or NO_PAGE, any shape -> where they lie, as steps name them; page 0 nowhere."""
        if self.levels is None:
            return pages
        return torch.where(pages < 0, pages, self.levels.row_of[pages.clamp_min(0)])

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        all_fine = bool((sources >= 0).all())
        for pages in self.pages if all_fine else [coarse.pages for coarse in self._coarse]:
            _copy_rows(pages, sources, targets)

    def coarsen(self, fine: torch.Tensor, moves: tuple[torch.Tensor, torch.Tensor], coarse: torch.Tensor) -> None:
        for layer, to in zip(self.stored, self._coarse, strict=True):
            key_rot, value_rot = map(_by_tile, self.ops.decode(layer.pages, fine, layer.layout))
            _copy_rows(layer.pages, *moves)
            page_ids = (coarse + len(to.pages)).repeat_interleave(to.layout.tiles)
            tile_ids = torch.arange(to.layout.tiles).repeat(len(coarse))
            self.ops.encode(key_rot, value_rot, page_ids, tile_ids, to.pages, to.layout, layer.key_shaping)

    def write(self, layer: int, key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites) -> None:
        """Store one layer's new tokens: key_rot, value_rot [T, H, D] float, in the order of `writes`."""
        self.ops.store_tokens(key_rot, value_rot, writes, self.stored[layer])

    @property
    def frame_stride(self) -> int:
        """From a request's first frame to its second one; 0: it has one for all its tiles."""
        return self.size.num_frames + 1 if self.size.frames_each == 2 else 0

    @property
    def sinks_bytes(self) -> int:
        return sum(sinks.nbytes for sinks in (*self.sink_key_rot, *self.sink_value_rot))

    @property
    def pages_bytes(self) -> int:
        return sum(pages.untyped_storage().nbytes() for pages in self.pages)

    def used_bytes(self, pages: int, window_pages: int) -> int:
        """Of so many pages that have owners."""
        if self.levels is None:
            return self.size.pages_bytes(pages, window_pages)
        return sum(self.levels.count(level) * self.levels.page_bytes[level] for level in (FINE, COARSE))

    @property
    def frames_bytes(self) -> int:
        return sum(frames.nbytes for frames in (*self.frame_key_rot, *self.frame_value_rot))


def _in_same_bytes(size: StoreSize, num_pages: int, device: str) -> tuple[list[torch.Tensor], list[CoarsePages]]:
    """Of each layer, fine pages from the start and coarse ones from the end of bytes for num_pages + 1 coarse ones."""
    pages, coarse = [], []
    count = most_fine(num_pages, size.level_bytes)
    for layout, (fine_bytes, coarse_bytes) in zip(size.layouts, size.level_bytes, strict=True):
        whole = torch.empty((num_pages + 1) * coarse_bytes, dtype=torch.uint8, device=device)
        pages.append(whole[: count * fine_bytes].view(count, fine_bytes))
        coarse.append(CoarsePages(layout, whole.view(-1, coarse_bytes)))
    return pages, coarse


def _copy_rows(pages: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Rows of pages [rows, page_bytes] to others that are none of them."""
    words = pages.view(torch.int64)  # torch copies element by element
    words[targets] = words[sources]


def _by_tile(rows: torch.Tensor) -> torch.Tensor:
    """[N, H, P, D] -> [N * tiles, H, 16, D]."""
    tiles: torch.Tensor = rows.unflatten(2, (-1, TILE_TOKENS)).transpose(1, 2).flatten(0, 1)
    return tiles
