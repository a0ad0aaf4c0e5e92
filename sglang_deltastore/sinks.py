"""Which sequence has which sink: raw copies of sequences' first tokens, by the page that a sequence begins with."""

from __future__ import annotations

from collections.abc import Callable

import torch

NO_SINK = -1


class SinkTable:
    """Sinks 1 .. num_sinks, each free or a page's. Sink 0 belongs to nobody: writes that must not count go there.

    The table is kept on the host; `of_page` [pages + 1] int64 mirrors it on the device, for kernels: the page's sink,
    or NO_SINK.
    """

    def __init__(self, num_sinks: int, num_pages: int, device: str) -> None:
        self.total = num_sinks
        self.missed = 0
        # Pages that belong to nobody now; whoever owns the pages may set it. Their sinks are then taken back when
        # none is free.
        self.free_pages: Callable[[], torch.Tensor] = lambda: torch.empty(0, dtype=torch.int64)
        self.of_page = torch.full((num_pages + 1,), NO_SINK, dtype=torch.int64, device=device)
        self._free = list(range(1, num_sinks + 1))
        self._sink_of: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def place(self, begun_pages: torch.Tensor, first_pages: torch.Tensor) -> None:
        """Pages begin another life, and lose the sink of their last one; those of them that begin a sequence get one.

        begun_pages, first_pages [any] int, on the host.
        """
        if not self.total:
            return
        self._release(begun_pages)
        if len(first_pages) > len(self._free):
            self._release(self.free_pages().cpu())
        count = min(len(first_pages), len(self._free))
        self.missed += len(first_pages) - count
        self._assign(first_pages[:count].tolist())

    def adopt(self, pages: list[int]) -> list[int]:
        """Sinks for pages that have none, as many as there are free ones; the sinks, in the pages' order."""
        return self._assign(pages[: len(self._free)])

    def _assign(self, pages: list[int]) -> list[int]:
        sinks = [self._free.pop() for _ in pages]
        self._sink_of.update(zip(pages, sinks, strict=True))
        self._mirror(pages, sinks)
        return sinks

    def _release(self, pages: torch.Tensor) -> None:
        had = [page for page in pages.tolist() if page in self._sink_of] if self._sink_of else []
        self._free.extend(self._sink_of.pop(page) for page in had)
        self._mirror(had, [NO_SINK] * len(had))

    def _mirror(self, pages: list[int], sinks: list[int]) -> None:
        if pages:
            device = self.of_page.device
            self.of_page[torch.tensor(pages, device=device)] = torch.tensor(sinks, device=device)
