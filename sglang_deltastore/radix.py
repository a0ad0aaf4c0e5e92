"""Who owns which page: the accounting identity, checked on sets and not on counts.

all pages 1 .. n  =  free  +  in nodes of the tree  +  of running requests      (disjoint)
all frames 1 .. m =  free  +  of running requests
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sharing import PageRecords


@dataclass(frozen=True)
class PageCensus:
    """Pages and frames by owner. `errors` is empty when the identity holds."""

    total: int
    free: int
    in_nodes: int
    running: int
    shared_tokens: int
    frames_total: int
    frames_free: int
    frames_running: int
    errors: tuple[str, ...]


def census(
    num_pages: int,
    page_tokens: int,
    free_pages: torch.Tensor,
    node_slots: torch.Tensor,
    running_slots: list[torch.Tensor],
    num_frames: int,
    free_frames: list[int],
    running_frames: list[int],
    records: PageRecords,
) -> PageCensus:
    """Count pages and frames by owner and check that each has exactly one.

    free_pages [F] page ids; node_slots [T] all slots that the tree's nodes hold; running_slots: for
    each running request the slots of its own row, those it shares with nodes included.
    """
    node_pages, errors = _node_pages(node_slots, page_tokens, num_pages)
    own = [torch.unique(slots // page_tokens) for slots in running_slots]
    own = [pages[~torch.isin(pages, node_pages)] for pages in own]
    running_pages = torch.cat(own) if own else node_pages.new_empty(0)

    owners = torch.zeros(num_pages + 1, dtype=torch.int32)
    for pages in (free_pages, node_pages, running_pages):
        owners.index_add_(0, pages.cpu().long(), torch.ones(len(pages), dtype=torch.int32))
    if int(owners[0]):
        errors.append("page 0 (padding) has an owner")
    errors += _describe("lost (owned by nobody)", (owners[1:] == 0).nonzero().flatten() + 1)
    errors += _describe("owned twice", (owners > 1).nonzero().flatten())
    if sorted([*free_frames, *running_frames]) != list(range(1, num_frames + 1)):
        errors.append(
            f"frames: {len(free_frames)} free + {len(running_frames)} running are not the {num_frames} there are"
        )
    return PageCensus(
        total=num_pages,
        free=len(free_pages),
        in_nodes=len(node_pages),
        running=len(running_pages),
        shared_tokens=records.shared_tokens(node_pages),
        frames_total=num_frames,
        frames_free=len(free_frames),
        frames_running=len(running_frames),
        errors=tuple(errors),
    )


def _node_pages(node_slots: torch.Tensor, page_tokens: int, num_pages: int) -> tuple[torch.Tensor, list[str]]:
    counts = torch.bincount(node_slots.cpu().long() // page_tokens, minlength=num_pages + 1)
    node_pages = counts.nonzero().flatten()
    partial = node_pages[counts[node_pages] != page_tokens]
    return node_pages, _describe("not wholly owned by one node path", partial)


def _describe(what: str, pages: torch.Tensor) -> list[str]:
    if not len(pages):
        return []
    return [f"{len(pages)} pages {what}: {pages[:8].tolist()}{' ...' if len(pages) > 8 else ''}"]
