"""Pages at two levels in the same bytes: which page is how fine, where it lies, and who gives up bits.

Pages begin fine while there is room, and are encoded again, coarser, when there is none (`policy.precision`): all of
them fit at the coarse level, so a page that is needed always has its place, and SGLang evicts only what is coarse.

    a layer's bytes   fine rows 0, 1, 2 ..  -->  free  <--  .. -4, -3, -2 coarse rows, -1

A row is where a page lies, as `deltastore_kernels.context.CoarsePages` numbers them; NO_PAGE, the last, is nobody's.
Rows of a level are all in use: the last one moves into the place of one that is given up, so that no bytes are lost
between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from deltastore_kernels.layout import NO_PAGE

FINE, COARSE = 0, 1

FirstLevel = Callable[[Sequence[int], int, int, Sequence[float]], int]
"""See policy.precision.first_level."""

_AHEAD = 1 / 256
"""Part of all pages that is demoted beyond what is needed now, so that not every decode step has to."""


class Rows(Protocol):
    """The bytes behind the rows, of all layers."""

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Rows [N] of one level to others of it, none of which is a source."""

    def coarsen(self, fine: torch.Tensor, moves: tuple[torch.Tensor, torch.Tensor], coarse: torch.Tensor) -> None:
        """Fine rows [N], encoded again, to coarse ones, which may overlap any fine row that is gone then; `moves`
        (see `move`) come between reading and writing."""


def most_fine(num_pages: int, page_bytes: Sequence[tuple[int, int]]) -> int:
    """How many fine pages fit; arguments as of `Levels`."""
    return min(num_pages * coarse // fine for fine, coarse in page_bytes)


class _Level:
    """Which page each row of a level holds; rows are numbers 0 .. count - 1, whatever the level makes of them."""

    def __init__(self, most: int) -> None:
        self._page_of = torch.zeros(most, dtype=torch.int64)
        self.count = 0

    @property
    def pages(self) -> torch.Tensor:
        return self._page_of[: self.count]

    def add(self, pages: torch.Tensor) -> torch.Tensor:
        """Returns their numbers."""
        begin, self.count = self.count, self.count + len(pages)
        self._page_of[begin : self.count] = pages
        return torch.arange(begin, self.count)

    def remove(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns numbers of pages that move, and where to."""
        left = self.count - len(numbers)
        targets = numbers[numbers < left]
        moves = torch.ones(len(numbers), dtype=torch.bool)
        moves[numbers[numbers >= left] - left] = False
        sources = left + moves.nonzero()[:, 0]
        self._page_of[targets] = self._page_of[sources]
        self.count = left
        return sources, targets


class Levels:
    """Rows of pages 1 .. num_pages, on the host.

    page_bytes: of each layer, a fine and a coarse page's; its bytes hold num_pages + 1 coarse ones.
    """

    def __init__(
        self, num_pages: int, page_bytes: Sequence[tuple[int, int]], rows: Rows, first_level: FirstLevel
    ) -> None:
        self.num_pages = num_pages
        self._layers_bytes, self._rows, self._first_level = sorted(set(page_bytes)), rows, first_level
        #: of a page of each level, over all layers
        self.page_bytes = tuple(map(sum, zip(*page_bytes, strict=True)))
        self._levels = _Level(most_fine(num_pages, page_bytes)), _Level(num_pages)
        #: page -> its row, or NO_PAGE
        self.row_of = torch.full((num_pages + 1,), NO_PAGE)
        #: page -> how many pages had been stored when it was last used
        self._used_at = torch.zeros(num_pages + 1, dtype=torch.int64)
        self._stored_pages = 0
        #: pages [N] that nobody owns, some of which have rows still; whoever allocates pages sets it
        self.free_pages: Callable[[], torch.Tensor] = lambda: self.row_of[:0]
        self.demoted_pages, self.demotion_seconds = 0, 0.0

    def count(self, level: int, among: torch.Tensor | None = None) -> int:
        """Pages at a level that have an owner, or of pages [N] those that are at it."""
        if among is None:
            return self._levels[level].count - self.count(level, self.free_pages())
        rows = self.row_of[among]
        return int(_at(rows, level).sum())

    def errors(self) -> tuple[str, ...]:
        """What does not add up: each row in use belongs to one page, which knows it."""
        found = []
        for name, level in (("fine", FINE), ("coarse", COARSE)):
            pages = self._levels[level].pages
            lost = self.row_of[pages] != _rows(torch.arange(len(pages)), level)
            if lost.any():
                found.append(
                    f"{int(lost.sum())} {name} rows of pages that do not know them: {pages[lost][:8].tolist()}"
                )
        rows, known = sum(level.count for level in self._levels), int((self.row_of != NO_PAGE).sum())
        return (*found, *([] if rows == known else [f"{rows} rows are in use, and {known} pages have one"]))

    def use(self, pages: torch.Tensor) -> None:
        """Requests read these pages [N] now."""
        self._used_at[pages] = self._stored_pages

    def place(self, pages: torch.Tensor) -> None:
        """Give rows to pages [N], each once, that are written from their beginning. There always is room: at the coarse
        level all pages have it."""
        pages = pages[pages > 0]
        if not len(pages):
            return
        self._give_up(pages)  # what was there before
        if self._short(len(pages), 0) > 0:
            self._give_up(self.free_pages())
        level = self._level_for(len(pages))
        short = self._short(len(pages), 0) if level == FINE else self._short(0, len(pages))
        if short > 0:
            self._demote(min(short + int(self.num_pages * _AHEAD), self._levels[FINE].count))
        self._put(pages, level)
        self._stored_pages += len(pages)
        self.use(pages)

    def _level_for(self, new_pages: int) -> int:
        """Where so many new pages begin."""
        fine, coarse = (level.count for level in self._levels)
        if self._short(new_pages, 0) > fine:
            return COARSE
        free_bytes = (self.num_pages - coarse) * self.page_bytes[COARSE] - fine * self.page_bytes[FINE]
        sinkable_bytes = fine * (self.page_bytes[FINE] - self.page_bytes[COARSE])
        rested_pages = self._stored_pages - int(self._used_at[self._levels[FINE].pages].min()) if fine else 0
        wanted_bytes = [new_pages * page_bytes for page_bytes in self.page_bytes]
        return self._first_level(wanted_bytes, free_bytes, sinkable_bytes, (rested_pages / self.num_pages, 0.0))

    def _short(self, new_fine: int, new_coarse: int) -> int:
        """How many fine pages have to become coarse before so many more pages fit; more than there are: they do not."""
        fine, coarse = self._levels[FINE].count + new_fine, self._levels[COARSE].count + new_coarse
        short = 0
        for fine_bytes, coarse_bytes in self._layers_bytes:
            over_bytes = fine * fine_bytes + (coarse - self.num_pages) * coarse_bytes
            if over_bytes > 0:
                gain_bytes = fine_bytes - coarse_bytes
                short = max(short, math.ceil(over_bytes / gain_bytes) if gain_bytes else fine + 1)
        return short

    def _give_up(self, pages: torch.Tensor) -> None:
        """The rows of those of pages [N] that have one."""
        for level in (FINE, COARSE):
            rows = self.row_of[pages]
            gone = rows[_at(rows, level)]
            if len(gone):
                self._rows.move(*self._remove(gone, level))
        self.row_of[pages] = NO_PAGE

    def _demote(self, count: int) -> None:
        """So many fine pages, those that were used longest ago."""
        started = time.perf_counter()
        pages = self._levels[FINE].pages
        # Of one use the last pages first: SGLang deals them out in order, and beginnings are what others may share.
        order = self._used_at[pages] * (self.num_pages + 1) + self.num_pages - pages
        coldest = pages[order.topk(count, largest=False).indices]
        fine = self.row_of[coldest]
        moves = self._remove(fine, FINE)
        self._put(coldest, COARSE)
        self._rows.coarsen(fine, moves, self.row_of[coldest])
        self.demoted_pages += count
        self.demotion_seconds += time.perf_counter() - started

    def _put(self, pages: torch.Tensor, level: int) -> None:
        self.row_of[pages] = _rows(self._levels[level].add(pages), level)

    def _remove(self, rows: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [N] of a level. Returns rows of pages that move, and where to."""
        sources, targets = self._levels[level].remove(_rows(rows, level))
        self.row_of[self._levels[level].pages[targets]] = _rows(targets, level)
        return _rows(sources, level), _rows(targets, level)


def _rows(numbers: torch.Tensor, level: int) -> torch.Tensor:
    """Numbers 0, 1 .. of a level -> its rows, and back."""
    return numbers if level == FINE else NO_PAGE - 1 - numbers


def _at(rows: torch.Tensor, level: int) -> torch.Tensor:
    """Which of rows [N] are of this level."""
    return rows > NO_PAGE if level == FINE else rows < NO_PAGE
