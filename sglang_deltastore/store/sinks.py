"""Which sequence has which sink: raw copies of sequences' first tokens, by the page that a sequence begins with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltastore_kernels.transfer import ToHost, to_device

NO_SINK = -1

_BEGUN_SHARE = 1 / 4096
"""Lost sinks are looked for once this part of all pages has begun another life: looking costs next to nothing then."""


class SinkTable:
    """Sinks 1 .. num_sinks, each free or a page's. Sink 0 belongs to nobody: writes that must not count go there.

    The host deals the sinks out and never looks at a page's number, which only the device knows:

        of_page  [pages + 1] int64  the page's sink, or NO_SINK
        page_of  [sinks + 1] int64  the page that a sink was given to, or 0

    A sink is lost once its page is free, or begins another life. Lost ones are looked for on the device once enough
    pages have begun to be worth it, and come back as soon as the answer has arrived.
    """

    def __init__(self, num_sinks: int, num_pages: int, device: str) -> None:
        self.total = num_sinks
        self.missed = 0
        self.of_page = torch.full((num_pages + 1,), NO_SINK, dtype=torch.int64, device=device)
        self.page_of = torch.zeros(num_sinks + 1, dtype=torch.int64, device=device)
        #: ids of pages that belong to nobody [any] int, on the device; whoever owns the pages may set it
        self.free_pages: Callable[[], torch.Tensor] = lambda: self.of_page[:0]
        self._free = list(range(1, num_sinks + 1))
        self._held: set[int] = set()
        self._begun_pages, self._begun_pages_worth_a_look = 0, max(1, int(num_pages * _BEGUN_SHARE))
        self._looking: tuple[ToHost, frozenset[int]] | None = None

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Of the maps on the device."""
        return self.of_page.nbytes + self.page_of.nbytes

    def count_begun(self, pages: int) -> None:
        """So many pages have begun another life."""
        self._begun_pages += pages

    def forget(self, begun_pages: torch.Tensor) -> None:
        """These pages [any] int64 begin another life, and not as a sequence's first; page 0 may be among them."""
        if self.total:
            self.of_page[begun_pages] = NO_SINK

    def begin(self, first_pages: torch.Tensor) -> None:
        """Sequences begin with these pages [F] int64: each gets a sink while there are any; the others are counted."""
        wanted = len(first_pages)
        if not self.total or not wanted:
            return
        if wanted > len(self._free):
            self._take_back()
        sinks = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
        self.missed += wanted - len(sinks)
        given = torch.full((wanted,), NO_SINK)
        given[: len(sinks)] = torch.tensor(sinks, dtype=torch.int64)
        self._held.update(sinks)
        given = to_device(given, self.of_page.device)
        self.of_page[first_pages] = given
        self.page_of[given[: len(sinks)]] = first_pages[: len(sinks)]
        self._take_back()

    def _take_back(self) -> None:
        """Look for lost sinks, if enough pages have begun since the last look, and take those that a look has found."""
        if self._looking is None and self._begun_pages >= self._begun_pages_worth_a_look:
            # Those dealt out from now on are not lost, whatever this look says.
            self._looking = ToHost(self._lost()), frozenset(self._held)
            self._begun_pages = 0
        if self._looking is None or not self._looking[0].arrived:
            return
        answer, held = self._looking
        self._looking = None
        lost = [sink for sink in answer.tensor.nonzero().flatten().tolist() if sink in held]
        self._held.difference_update(lost)
        self._free.extend(lost)

    def _lost(self) -> torch.Tensor:
        """[sinks + 1] bool, on the device: whether no page has the sink that anybody uses."""
        is_free = torch.zeros_like(self.of_page, dtype=torch.bool)
        is_free[self.free_pages().long()] = True
        own = torch.arange(len(self.page_of), device=self.page_of.device)
        return is_free[self.page_of] | (self.of_page[self.page_of] != own)
