"""Attention over the page store: one step's plan, then each layer.

extend   new queries over (packed prefix + frame) and over the new tokens themselves, then store
decode   store the new token, then its query over everything stored
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltastore_kernels.context import PagedContext, Scoring
from deltastore_kernels.layout import TILE_TOKENS

from .pool import PageStore, WritePlan, plan_writes


@dataclass(frozen=True)
class Step:
    """What one forward step reads and writes; the same for all layers.

    packed_tokens, frame_tokens [B] int64: stored tokens that the queries see in pages and in the frame; in decode the
    new token is among them. first_pages [B] int64: where each context begins. new_tokens: how many each request brings.
    """

    page_table: torch.Tensor
    first_pages: torch.Tensor
    frame_ids: torch.Tensor
    packed_tokens: torch.Tensor
    frame_tokens: torch.Tensor
    new_tokens: list[int]
    writes: WritePlan


def plan_step(
    req_to_token: torch.Tensor,
    request_rows: torch.Tensor,
    prefix_tokens: torch.Tensor,
    new_tokens: torch.Tensor,
    page_tokens: int,
    decode: bool,
) -> Step:
    """req_to_token [rows, context] int32: SGLang's slot of each token; request_rows [B] its rows;
    prefix_tokens, new_tokens [B] int64: tokens stored before this step, and brought by it."""
    total_tokens = prefix_tokens + new_tokens
    longest = int(total_tokens.max()) if len(total_tokens) else 0
    first_slots = req_to_token[request_rows, : -(-longest // page_tokens) * page_tokens : page_tokens]
    page_table = first_slots.long() // page_tokens
    read_tokens = total_tokens if decode else prefix_tokens
    packed_tokens = read_tokens // TILE_TOKENS * TILE_TOKENS
    return Step(
        page_table=page_table,
        first_pages=page_table[:, 0],
        frame_ids=request_rows,
        packed_tokens=packed_tokens,
        frame_tokens=read_tokens - packed_tokens,
        new_tokens=new_tokens.tolist(),
        writes=plan_writes(prefix_tokens, new_tokens, request_rows, page_table, page_tokens),
    )


def extend(
    store: PageStore,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scoring: Scoring,
) -> torch.Tensor:
    """query [T, Hq, D], key, value [T, H, D] of the new tokens -> out [T, Hq, D]."""
    basis = store.bases[layer]
    query_rot, key_rot, value_rot = basis.rotate_query(query), basis.rotate_key(key), basis.rotate_value(value)
    context = _context(store, layer, step)
    out_rot, _ = store.ops.attend_extend(query_rot, key_rot, value_rot, step.new_tokens, context, scoring)
    # After attention: the write may turn the frame that attention read into a packed tile.
    store.write(layer, key_rot, value_rot, step.writes)
    return basis.restore_value(out_rot)


def decode(
    store: PageStore,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scoring: Scoring,
) -> torch.Tensor:
    """query [B, Hq, D], key, value [B, H, D]: one new token for each request -> out [B, Hq, D]."""
    basis = store.bases[layer]
    query_rot, key_rot, value_rot = basis.rotate_query(query), basis.rotate_key(key), basis.rotate_value(value)
    store.write(layer, key_rot, value_rot, step.writes)
    out_rot, _ = store.ops.attend_decode(query_rot, _context(store, layer, step), scoring)
    return basis.restore_value(out_rot)


def _context(store: PageStore, layer: int, step: Step) -> PagedContext:
    return PagedContext(
        layout=store.layouts[layer],
        pages=store.pages[layer],
        page_table=step.page_table,
        packed_tokens=step.packed_tokens,
        frame_key_rot=store.frame_key_rot[layer],
        frame_value_rot=store.frame_value_rot[layer],
        frame_ids=step.frame_ids,
        frame_tokens=step.frame_tokens,
        sinks=store.sinks(layer, step.first_pages),
    )
