"""Attention over the page store: one step's plan, then each layer.

extend   new queries over (packed prefix + frame) and over the new tokens themselves, then store
decode   store the new token, then its query over everything stored; so for several drafts of what may follow, each of
         which sees what it would see if the others before it stay

A plan is a step for each part of the store: the same but for the pages' numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deltastore_kernels.context import Scoring, SharedPrefix, StepContext
from deltastore_kernels.layout import TILE_TOKENS
from deltastore_kernels.ops import DecodePlan, ExtendPlan
from deltastore_kernels.shared_prefix import find_shared_prefix
from deltastore_kernels.token_writes import TokenWrites
from deltastore_kernels.transfer import all_to_device

from .pages import PageStore
from .writes import frames_of, plan_decode_writes, plan_draft_writes, plan_writes, without_unfinished


@dataclass(frozen=True)
class ExtendStep:
    """What one extend step reads and writes; the same for all layers of a part of the store."""

    attention: ExtendPlan
    writes: TokenWrites


@dataclass(frozen=True)
class DecodeStep:
    """What one decode step reads and writes; the same for all layers of a part of the store."""

    attention: DecodePlan
    writes: TokenWrites


def plan_extend(
    store: PageStore,
    req_to_token: torch.Tensor,
    request_rows: torch.Tensor,
    frames: Sequence[int],
    prefix_tokens: torch.Tensor,
    new_tokens: torch.Tensor,
) -> tuple[ExtendStep, ...]:
    """req_to_token [rows, context] int32: SGLang's slot of each token; request_rows [B] its rows, both on the store's
    device; frames: the same rows on the host; prefix_tokens, new_tokens [B] int64 on the host: tokens stored before
    this step, and brought by it."""
    device, page_tokens = req_to_token.device, store.size.page_tokens
    total_tokens = prefix_tokens + new_tokens
    longest = int(total_tokens.max()) if len(total_tokens) else 0
    page_table = _page_table(req_to_token[:, : max(longest, 1)], request_rows, page_tokens)
    read_sinks, written_sinks = _sinks(store, frames, (prefix_tokens == 0) & (new_tokens > 0))
    writes = plan_writes(
        prefix_tokens, new_tokens, request_rows, page_table, page_tokens, written_sinks, store.frame_stride
    )
    _settle(store, page_table, total_tokens, writes)
    read_tokens, read_sinks = all_to_device((prefix_tokens, read_sinks), device)
    store.sink_of_frame[request_rows] = read_sinks
    contexts = _contexts(store, page_table, request_rows, read_tokens, prefix_tokens.tolist())
    counts = new_tokens.tolist()
    return tuple(
        ExtendStep(store.ops.plan_extend(context, counts, bounds), part_writes)
        for context, bounds, part_writes in zip(contexts, store.bounds, _writes(store, writes), strict=True)
    )


def _sinks(store: PageStore, frames: Sequence[int], begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sinks [B] that requests in these frames read, and those that they write, or 0; begins [B] bool: whether this
    step brings a request's first token. All on the host."""
    table = store.sink_table
    written = [table.to_write(frame) if first else 0 for frame, first in zip(frames, begins.tolist(), strict=True)]
    read = [table.of_frame(frame) for frame in frames]  # those that this step writes among them
    return torch.tensor(read, dtype=torch.int64), torch.tensor(written, dtype=torch.int64)


def plan_decode(
    store: PageStore,
    req_to_token: torch.Tensor,
    request_rows: torch.Tensor,
    total_tokens: torch.Tensor,
    new_tokens: int = 1,
) -> tuple[DecodeStep, ...]:
    """As `plan_extend` for as many new tokens of each request; total_tokens [B] int64 on the store's device, the new
    ones included. More than one are drafts, for which the store has room (StoreSize.draft_tokens).

    On a GPU no shape depends on a value and nothing waits for the host, so that a CUDA graph can hold it.
    """
    page_tokens = store.size.page_tokens
    on_host = req_to_token.device.type == "cpu"
    if on_host and len(total_tokens):
        req_to_token = req_to_token[:, : int(total_tokens.max())]
    page_table = _page_table(req_to_token, request_rows, page_tokens)
    requests = total_tokens, request_rows, page_table, page_tokens
    if new_tokens == 1:
        writes = plan_decode_writes(*requests, store.frame_stride)
    else:
        writes = plan_draft_writes(*requests, new_tokens, store.frame_stride)
    if on_host:
        writes = without_unfinished(writes)
    _settle(store, page_table, total_tokens, writes)
    # A new token is stored before its query reads, so it is among the tokens that are read: a context for each of them.
    if new_tokens > 1:
        each = torch.arange(1 - new_tokens, 1, device=total_tokens.device)
        total_tokens = (total_tokens[:, None] + each).flatten()
        page_table = page_table[:, None].expand(-1, new_tokens, -1).flatten(0, 1)
        request_rows = request_rows[:, None].expand(-1, new_tokens).flatten()
    contexts = _contexts(store, page_table, request_rows, total_tokens)
    return tuple(
        DecodeStep(store.ops.plan_decode(context, bounds), part_writes)
        for context, bounds, part_writes in zip(contexts, store.bounds, _writes(store, writes), strict=True)
    )


def _page_table(req_to_token: torch.Tensor, request_rows: torch.Tensor, page_tokens: int) -> torch.Tensor:
    return req_to_token[request_rows, ::page_tokens].long() // page_tokens


def _settle(store: PageStore, page_table: torch.Tensor, total_tokens: torch.Tensor, writes: TokenWrites) -> None:
    """Where pages are of two levels: those of the requests' total_tokens [B] are in use, and those that this step
    begins get their place."""
    if store.levels is None:
        return
    pages = -(-total_tokens // store.size.page_tokens)
    store.levels.use(page_table[torch.arange(page_table.shape[1]) < pages[:, None]])
    store.levels.place(writes.page_ids[writes.tile_ids == 0])


def _writes(store: PageStore, writes: TokenWrites) -> list[TokenWrites]:
    """The same for each part of the store."""
    if not store.size.has_windows:
        return [replace(writes, page_ids=store.rows_of(writes.page_ids)) if store.levels else writes]
    return [writes, replace(writes, page_ids=store.window_pages(writes.page_ids))]


def _contexts(
    store: PageStore,
    page_table: torch.Tensor,
    request_rows: torch.Tensor,
    read_tokens: torch.Tensor,
    stored_tokens: list[int] | None = None,
) -> list[StepContext]:
    """One for each part of the store. read_tokens [B] int64: stored tokens that the queries see, on the device;
    stored_tokens: the same on the host, where it knows them."""
    tiles = read_tokens // TILE_TOKENS
    packed_tokens = tiles * TILE_TOKENS
    # What every layer's kernels read: GPUs like the small integers, and would convert them in every layer.
    small = torch.int64 if page_table.device.type == "cpu" else torch.int32
    whole = StepContext(
        page_table=store.rows_of(page_table).to(small),
        packed_tokens=packed_tokens.to(small),
        frame_ids=frames_of(request_rows, tiles, store.frame_stride).to(small),
        frame_tokens=(read_tokens - packed_tokens).to(small),
        sink_ids=store.sink_of_frame[request_rows].to(small),
        shared=_shared(store, page_table, packed_tokens),
        stored_tokens=stored_tokens,
    )
    if not store.size.has_windows:
        return [whole]
    # Requests that have no pages any more where their contexts begin share those: no window shows them.
    window_table = store.window_pages(page_table)
    shared = _shared(store, window_table, packed_tokens)
    return [whole, replace(whole, page_table=window_table.to(small), shared=shared)]


def _shared(store: PageStore, page_table: torch.Tensor, packed_tokens: torch.Tensor) -> SharedPrefix | None:
    return find_shared_prefix(page_table, packed_tokens, store.size.page_tokens) if store.ops.shares_reads else None


def extend(
    store: PageStore,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: tuple[ExtendStep, ...],
    scoring: Scoring,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [T, Hq, D], key, value [T, H, D] of the new tokens, sink_logits [Hq] -> out [T, Hq, D]."""
    basis, step = store.bases[layer], plan[store.part_of[layer]]
    query_rot, key_rot, value_rot = store.ops.enter(query, key, value, basis)
    found = step.attention.run(query_rot, key_rot, value_rot, store.stored[layer], scoring)
    # After attention: the write may turn the frame that attention read into a packed tile.
    store.write(layer, key_rot, value_rot, step.writes)
    return basis.leave(*found, query_rot, scoring, sink_logits)


def decode(
    store: PageStore,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: tuple[DecodeStep, ...],
    scoring: Scoring,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `extend`; query [T, Hq, D], key, value [T, H, D]: each request's new tokens -> out [T, Hq, D]."""
    basis, step = store.bases[layer], plan[store.part_of[layer]]
    query_rot, key_rot, value_rot = store.ops.enter(query, key, value, basis)
    store.write(layer, key_rot, value_rot, step.writes)
    return step.attention.run(query_rot, store.stored[layer], scoring, basis, sink_logits)[0]
