"""Stand-in for the attention of SGLang's `intel_amx` backend, in plain torch: with it a draft model reads its own KV.

A request's tokens lie in the slots of its row of req_to_token, in key_buffer and value_buffer [slots, H, D]. Drafts are
chains, of models with attention alone.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


@torch.library.custom_op("sgl_kernel::extend_attention_cpu", mutates_args=("out",))
def extend_attention_cpu(
    query: torch.Tensor,
    _key: torch.Tensor | None,
    _value: torch.Tensor | None,
    out: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    key_scale: float,
    value_scale: float,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    _longest: int,
    scale: float,
    logit_cap: float,
    is_cross: bool,
    window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    is_causal: bool,
) -> None:
    """query, out [T, Hq, D], of which a request's are those from extend_start_loc on, its last extend_seq_lens tokens
    of seq_lens, all [B]; they are in the buffers already. window: of so many tokens, a query's own among them; 0:
    none."""
    _check(key_scale, value_scale, logit_cap, encoder_lens, sinks, tree_mask, is_cross or not is_causal)
    for row, total, new, first in zip(req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc, strict=True):
        slots, rows = req_to_token[row, :total].long(), slice(int(first), int(first + new))
        out[rows] = _attend(query[rows], key_buffer[slots], value_buffer[slots], scale, window)


@torch.library.custom_op("sgl_kernel::decode_attention_cpu", mutates_args=("key_buffer", "value_buffer", "out"))
def decode_attention_cpu(
    query: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    key_scale: float,
    value_scale: float,
    out: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    _scratch: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    logit_cap: float,
    is_cross: bool,
    window: int,
    encoder_lens: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """As extend_attention_cpu for one new token of each request, key, value [B, H, D], which goes to `slots` [B]
    first."""
    _check(key_scale, value_scale, logit_cap, encoder_lens, sinks, None, is_cross)
    key_buffer[slots] = key.view_as(key_buffer[slots]).to(key_buffer.dtype)
    value_buffer[slots] = value.view_as(value_buffer[slots]).to(value_buffer.dtype)
    for request, (row, total) in enumerate(zip(req_pool_indices, seq_lens, strict=True)):
        read, rows = req_to_token[row, :total].long(), slice(request, request + 1)
        out[rows] = _attend(query[rows], key_buffer[read], value_buffer[read], scale, window)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """query [N, Hq, D], the last N of key, value [T, H, D] -> [N, Hq, D], causal."""
    at = torch.arange(len(key))
    mask = at <= at[-len(query) :, None]
    if window:
        mask &= at > at[-len(query) :, None] - window
    query, key, value = (x.transpose(0, 1)[None].to(query.dtype) for x in (query, key, value))
    found = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


def _check(key_scale: float, value_scale: float, logit_cap: float, *others: torch.Tensor | bool | None) -> None:
    if (key_scale, value_scale, logit_cap) != (1, 1, 0) or any(x is not None and x is not False for x in others):
        raise NotImplementedError(
            "the stand-in for sgl_kernel attends for drafts to 16- and 32-bit floats, causally and in chains, without "
            "learned sinks and logit caps; draft with another model, or with --speculative-algorithm NGRAM"
        )


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    _seq_lens: torch.Tensor,
    topk: int,
    _steps: int,
    _width: int,
) -> torch.Tensor:
    """-> the rows of req_to_token that drafts of each request read: its own, as each has one chain."""
    if topk != 1:
        raise NotImplementedError(f"{topk} drafts for the same place: the stand-in for sgl_kernel knows chains, of 1")
    return req_to_token[req_pool_indices]
