"""Attention of drafts: a few tokens that follow on each request's stored context, and are not stored themselves.

Over what is stored all of a request's drafts see the same, so that they are no more than further query heads of a
decode step, whose kernels read the context once for all of them. Over each other they see causally, which is small.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .context import LayerStore, Scoring
from .ops import DecodePlan

Attended = tuple[torch.Tensor, torch.Tensor]
"""out_rot [B, N, Hq, D] float32, lse [B, N, Hq] float32 (natural logarithm)."""


def attend_drafts(
    plan: DecodePlan,
    query_rot: torch.Tensor,
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    layer: LayerStore,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query_rot [B, N, Hq, D], key_rot, value_rot [B, N, H, D] float of N drafts of each request; `plan` is of the
    requests' stored tokens. A window shows at least N tokens. Nothing depends on a value: a CUDA graph can hold it.

    Returns out_rot [B, N, Hq, D] in query_rot's dtype and lse [B, N, Hq] float32.
    """
    out_rot, lse = _merged(
        _over_stored(plan, query_rot, layer, scoring), _over_each_other(query_rot, key_rot, value_rot, scoring)
    )
    return out_rot.to(query_rot.dtype), lse


def _over_stored(plan: DecodePlan, query_rot: torch.Tensor, layer: LayerStore, scoring: Scoring) -> Attended:
    batch, drafts, query_heads, dim = query_rot.shape
    if scoring.window_left is not None:
        # A decode step's query is its request's last stored token: a draft's window shows i + 1 tokens less of those.
        runs = [
            plan.run(query_rot[:, i].contiguous(), layer, replace(scoring, window_left=scoring.window_left - 1 - i))
            for i in range(drafts)
        ]
        outs, lses = zip(*runs, strict=True)
        return torch.stack(outs, 1).float(), torch.stack(lses, 1)
    heads = layer.layout.num_kv_heads
    grouped = query_rot.unflatten(2, (heads, -1)).transpose(1, 2).reshape(batch, drafts * query_heads, dim)
    out_rot, lse = plan.run(grouped, layer, scoring)
    by_head = (heads, drafts, query_heads // heads)
    out_rot = out_rot.unflatten(1, by_head).transpose(1, 2).flatten(2, 3)
    return out_rot.float(), lse.unflatten(1, by_head).transpose(1, 2).flatten(2, 3)


def _over_each_other(
    query_rot: torch.Tensor, key_rot: torch.Tensor, value_rot: torch.Tensor, scoring: Scoring
) -> Attended:
    drafts, heads = key_rot.shape[1:3]
    query = query_rot.float().unflatten(2, (heads, -1)) * scoring.scale
    scores = torch.einsum("bihgd,bjhd->bihgj", query, key_rot.float())
    if scoring.soft_cap:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    later = torch.ones(drafts, drafts, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(later[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    out_rot = torch.einsum("bihgj,bjhd->bihgd", (scores - lse[..., None]).exp(), value_rot.float())
    return out_rot.flatten(2, 3), lse.flatten(2, 3)


def _merged(first: Attended, second: Attended) -> Attended:
    lse = torch.logaddexp(first[1], second[1])
    weights = [(its_lse - lse).exp()[..., None] for _, its_lse in (first, second)]
    return first[0] * weights[0] + second[0] * weights[1], lse
