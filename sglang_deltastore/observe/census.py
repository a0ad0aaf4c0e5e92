"""Who owns which page: the accounting identity.

all pages 1 .. n  =  free  +  in nodes of the tree  +  of running requests      (disjoint)
all frames 1 .. m =  free  +  of running requests

Where pages behind windows are freed, layers with a window have pages of their own. The first line holds of them as
well, but a node may lack any of its pages there.

`count_errors` checks it on counts, at any time and at no cost. `Census` looks at every page, in slices, while nothing
runs and the tree keeps still: pages are then free or in nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deltastore_kernels.transfer import ToHost

from .nodes import Node

SLICE_SECONDS = 0.002
"""A request that comes in the meantime waits no longer than this."""

_SLOTS_AT_ONCE = 8_192
"""Counted between two looks at the clock: some 0.2 ms on a CPU."""

_MANY = 2
"""Owners are counted this far."""

_BROKEN = 4


@dataclass(frozen=True)
class Counts:
    """Pages and frames by owner, from lengths alone."""

    pages_total: int
    pages_free: int
    pages_in_nodes: int
    pages_running: int
    frames_total: int
    frames_free: int
    frames_running: int
    window_pages_total: int = 0
    window_pages_free: int = 0
    window_pages_in_nodes: int = 0
    window_pages_running: int = 0
    pages_held: int = 0
    """Of those in nodes."""


def count_errors(counts: Counts, free_frames: Sequence[int], running_frames: Sequence[int]) -> tuple[str, ...]:
    """What does not add up. The frames are few: they are looked at one by one."""
    errors = []
    for what in ("pages", "window_pages"):
        total, *parts = (getattr(counts, f"{what}_{state}") for state in ("total", "free", "in_nodes", "running"))
        if sum(parts) != total:
            errors.append(
                f"{what}: {parts[0]} free + {parts[1]} in nodes + {parts[2]} of running requests are not the {total} "
                "there are"
            )
    if sorted([*free_frames, *running_frames]) != list(range(1, counts.frames_total + 1)):
        errors.append(
            f"frames: {len(free_frames)} free + {len(running_frames)} running are not the {counts.frames_total} "
            "there are"
        )
    return tuple(errors)


class Census:
    """One look at every page. Begin another one when the tree has changed.

    free_pages [F] int64: page ids; nodes: of the mirror; slots_of: the slots that a node holds [tokens] int64, on the
    same device as free_pages; may_lack: they may be 0 for a page that the node lacks. On a GPU owners are counted there
    and nobody waits for it.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        free_pages: torch.Tensor,
        nodes: Sequence[Node],
        slots_of: Callable[[Node], torch.Tensor],
        may_lack: bool = False,
    ) -> None:
        self._num_pages, self._page_tokens, self._slots_of = num_pages, page_tokens, slots_of
        self._may_lack = may_lack
        device = free_pages.device
        self._owners, self._broken = (torch.zeros(num_pages + 1, dtype=torch.int32, device=device) for _ in range(2))
        self._lanes = torch.arange(page_tokens, device=device)
        self._errors: list[str] = []
        self._steps = self._walk(nodes, free_pages)
        self._report: ToHost | None = None

    def go_on(self, budget_s: float = SLICE_SECONDS) -> tuple[str, ...] | None:
        """Look on for that long. Returns what is wrong once all is looked at, None before."""
        if self._report is None:
            until = time.perf_counter() + budget_s
            for _ in self._steps:
                if time.perf_counter() >= until:
                    return None
            self._report = ToHost(self._counted())
            return None
        if not self._report.arrived:
            return None
        return (*self._errors, *self._verdict(self._report.tensor.numpy()))

    def _walk(self, nodes: Sequence[Node], free_pages: torch.Tensor) -> Iterator[None]:
        waiting: list[torch.Tensor] = []
        waiting_slots = 0
        for node in nodes:
            slots = self._slots_of(node)
            if len(slots) != node.tokens or node.tokens % self._page_tokens:
                self._errors.append(f"node {node.id} holds {len(slots)} slots for {node.tokens} tokens")
                continue
            waiting.append(slots)
            waiting_slots += len(slots)
            if waiting_slots >= _SLOTS_AT_ONCE or len(waiting) >= 64:
                self._count_slots(torch.cat(waiting))
                waiting, waiting_slots = [], 0
                yield
        if waiting:
            self._count_slots(torch.cat(waiting))
            yield
        for part in free_pages.split(_SLOTS_AT_ONCE):
            self._count_pages(self._known(part))
            yield

    def _count_slots(self, slots: torch.Tensor) -> None:
        slots = slots.view(-1, self._page_tokens)
        lacks = (slots == 0).all(dim=1) if self._may_lack else torch.zeros_like(slots[:, 0], dtype=torch.bool)
        pages = self._known(slots[:, 0] // self._page_tokens)
        self._count_pages(pages, ~lacks)
        whole = (slots == pages[:, None] * self._page_tokens + self._lanes).all(dim=1)
        self._broken.index_add_(0, pages, (~whole & ~lacks).int())

    def _count_pages(self, pages: torch.Tensor, is_owned: torch.Tensor | None = None) -> None:
        owned = torch.ones_like(pages, dtype=torch.int32) if is_owned is None else is_owned.int()
        self._owners.index_add_(0, pages, owned)

    def _known(self, pages: torch.Tensor) -> torch.Tensor:
        """Numbers that no page has become page 0, which must have no owner; a GPU would stop at them."""
        return torch.where((pages >= 1) & (pages <= self._num_pages), pages, 0).long()

    def _counted(self) -> torch.Tensor:
        """[pages + 1] uint8: owners, and whether the page is broken."""
        return (self._owners.clamp_max(_MANY) + _BROKEN * (self._broken > 0)).to(torch.uint8)

    @staticmethod
    def _verdict(report: np.ndarray) -> list[str]:
        owners = report % _BROKEN
        errors = ["a page that there is not (or page 0, padding) has an owner"] if owners[0] else []
        errors += _describe("lost (owned by nobody)", np.flatnonzero(owners[1:] == 0) + 1)
        errors += _describe("owned twice", np.flatnonzero(owners[1:] >= _MANY) + 1)
        return errors + _describe("not wholly owned by one node", np.flatnonzero(report[1:] >= _BROKEN) + 1)


def _describe(what: str, pages: np.ndarray) -> list[str]:
    if not len(pages):
        return []
    return [f"{len(pages)} pages {what}: {pages[:8].tolist()}{' ...' if len(pages) > 8 else ''}"]
