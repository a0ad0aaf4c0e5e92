"""attend_extend in C++: as attend_decode over the stored tokens, in float32 over the new ones
(csrc/cpu/attend_segment.cpp)."""

from __future__ import annotations

import torch

from ... import native
from ...context import PagedContext, Scoring


def attend_extend(
    query_rot: torch.Tensor,
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    new_tokens: list[int],
    context: PagedContext,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin; over packed pages the query and the weights are rounded to 8 bits on the way
    (tests/budgets.py: BACKEND_ATTEND_INT8)."""
    rows = (x.float().contiguous() for x in (query_rot, key_rot, value_rot))
    out_rot, lse = native.attend_extend(*rows, new_tokens, context, scoring)
    return out_rot if query_rot.dtype is torch.float32 else out_rot.to(query_rot.dtype), lse
