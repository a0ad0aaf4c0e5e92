"""Which requests of a batch begin with the same pages."""

from __future__ import annotations

import torch

from .context import SharedPrefix


def find_shared_prefix(page_table: torch.Tensor, packed_tokens: torch.Tensor, page_tokens: int) -> SharedPrefix:
    """page_table [B, N] int, packed_tokens [B] int -> who shares how many leading pages, on the same device.

    Requests with the same first page have the first of them as their leader: in a radix tree whatever is shared is
    shared from the root on. Only whole packed pages count. Shapes depend on shapes alone and nothing waits for the
    device, so a CUDA graph can hold it. Entries of the table behind a request's packed pages may be anything.
    """
    batch, width = page_table.shape
    own = torch.arange(batch, device=page_table.device)
    whole_pages = (packed_tokens // page_tokens).clamp(max=width)
    if batch == 0 or width == 0:
        return SharedPrefix(own.int(), torch.zeros_like(own, dtype=torch.int32))
    same_first = (page_table[:, None, 0] == page_table[None, :, 0]) & (whole_pages[:, None] > 0) & (whole_pages > 0)
    leader = torch.where(same_first.any(1), same_first.int().argmax(1), own)
    column = torch.arange(width, device=page_table.device)
    same = (page_table == page_table[leader]) & (column < torch.minimum(whole_pages, whole_pages[leader])[:, None])
    run = same.long().cumprod(1).sum(1)  # of each request with its leader
    least = run.new_full((batch,), width).scatter_reduce(0, leader, run, "amin")
    members = torch.zeros_like(run).scatter_add(0, leader, torch.ones_like(run))
    pages = torch.where(members[leader] > 1, least[leader], 0)
    return SharedPrefix(leader.int(), pages.int())
