"""attend_decode in C++: integer dot products over the packed codes (csrc/cpu/attend_segment.cpp)."""

from __future__ import annotations

import torch

from ... import native
from ...context import PagedContext, Scoring


def attend_decode(
    query_rot: torch.Tensor, context: PagedContext, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin; over packed pages the query and the weights are rounded to 8 bits on the way
    (tests/budgets.py: BACKEND_ATTEND_INT8)."""
    out_rot, lse = native.attend_decode(query_rot.float().contiguous(), context, scoring)
    return out_rot if query_rot.dtype is torch.float32 else out_rot.to(query_rot.dtype), lse
