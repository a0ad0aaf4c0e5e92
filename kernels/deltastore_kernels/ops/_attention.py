"""What the two attention twins share: gathering a request's context, and plain softmax attention."""

from __future__ import annotations

import torch

from ..context import LayerStore, Scoring, StepContext
from .decode.reference import decode_stored

QUERY_BLOCK_TOKENS = 64
"""Query rows scored at once: few enough that the scores of a long context stay in cache."""


def stored_context(
    step: StepContext, layer: LayerStore, request: int, window_left: int | None, includes_query: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's stored tokens in one layer as key_rot, value_rot [H, N, D] float32.

    Pages that lie wholly before the first query's window are neither read nor returned.
    """
    page_tokens = layer.layout.page_tokens
    packed, in_frame = int(step.packed_tokens[request]), int(step.frame_tokens[request])
    first = 0
    if window_left is not None:
        first_query = packed + in_frame - (1 if includes_query else 0)
        first = min(max(0, first_query - window_left) // page_tokens * page_tokens, packed)
    table = step.page_table[request, first // page_tokens : -(-packed // page_tokens)]
    parts = [decoded.transpose(0, 1).flatten(1, 2)[:, : packed - first] for decoded in decode_stored(layer, table)]
    if layer.sink_tokens and first == 0 and packed and (slot := int(step.sink_ids[request])) >= 0:
        raw = (layer.sink_key_rot[slot].float(), layer.sink_value_rot[slot].float())
        parts = [torch.cat((sink, part[:, sink.shape[1] :]), dim=1) for sink, part in zip(raw, parts, strict=True)]
    frame = int(step.frame_ids[request])
    keys = torch.cat((parts[0], layer.frame_key_rot[frame, :, :in_frame].float()), dim=1)
    values = torch.cat((parts[1], layer.frame_value_rot[frame, :, :in_frame].float()), dim=1)
    return keys, values


def attend_rows(
    query_rot: torch.Tensor,
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query_rot [R, Hq, D]: the last R positions of the N keys; key_rot, value_rot [H, N, D].

    Returns out_rot [R, Hq, D] and lse [R, Hq], float32.
    """
    rows, query_heads, head_dim = query_rot.shape
    heads, total, _ = key_rot.shape
    group = query_heads // heads
    out_rot = key_rot.new_empty(rows, query_heads, head_dim)
    lse = key_rot.new_empty(rows, query_heads)
    for begin in range(total - rows, total, QUERY_BLOCK_TOKENS):  # in keys: query r is key total - rows + r
        end = min(begin + QUERY_BLOCK_TOKENS, total)
        shown = 0 if scoring.window_left is None else max(0, begin - scoring.window_left)
        row = slice(begin - total + rows, end - total + rows)
        query = query_rot[row].to(key_rot.dtype) * scoring.scale
        grouped = query.unflatten(1, (heads, group)).permute(1, 2, 0, 3).reshape(heads, -1, head_dim)
        scores = grouped @ key_rot[:, shown:end].transpose(1, 2)
        if scoring.soft_cap:
            scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
        scores = scores.view(query_heads, end - begin, end - shown)
        scores.masked_fill_(_hidden(begin, end, shown, scoring.window_left, scores.device), float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        weight_sum = weights.sum(-1, keepdim=True)
        out = (weights.view(heads, -1, end - shown) @ value_rot[:, shown:end]).view(query_heads, -1, head_dim)
        out_rot[row] = (out / weight_sum).transpose(0, 1)
        lse[row] = (largest + weight_sum.log()).squeeze(-1).T
    return out_rot, lse


def _hidden(begin: int, end: int, shown: int, window_left: int | None, device: torch.device) -> torch.Tensor:
    """[end - begin, end - shown] bool: which of keys shown..end each of queries begin..end must not see."""
    query, key = torch.arange(begin, end, device=device)[:, None], torch.arange(shown, end, device=device)
    hidden = key > query
    return hidden if window_left is None else hidden | (key < query - window_left)
