"""Facts about a running store as plain Python types, ready for JSON. Imports nothing of ours.

context        what one user sees: a running request's whole text so far, or one that has ended, as far as it is
               stored and no longer context goes on from it (a leaf of the tree)
conversation   contexts that go on from the same prompt: the earliest prompt stored whole in their paths is the
               same request's. A turn that is asked anew is a branch of its conversation; a context without such
               a prompt is a conversation of its own

logical tokens  >=  conversation tokens  >=  stored tokens
every context       every conversation       every token
by itself           as a tree by itself      once
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class NodeStats:
    """A node: a stretch of stored tokens that the same contexts share, cut where prompts end.

    id               number of its first page; another node may get it once this one is gone
    parent           id of the node before it; 0: contexts begin here
    start_tokens     tokens before it in its contexts
    tokens           its own
    contexts         that contain it, each of which would store it by itself
    conversations    that contain it
    running          requests that read it now
    requests         that have ended and had its first page in their context, since that page was written
    hits             those of them that found its first page stored, and did not compute it
    hit_tokens       tokens that requests found stored here, summed over its pages
    children         nodes that go on from it
    subtree_tokens   its own tokens and those of all nodes below
    first_token_ids  the first page's, only with --kv-compress-show-prompts; text: the same as text, added by the
                     HTTP server
    """

    id: int
    parent: int
    start_tokens: int
    tokens: int
    contexts: int
    conversations: int
    running: int
    requests: int
    hits: int
    hit_tokens: int
    children: int
    subtree_tokens: int
    first_token_ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class StoreStats:
    """One snapshot. Byte counts cover all layers; counts of what happened go back to the server's start.

    format            of all layers, or their mean bits where a calibration deals them out
    ratio             fp16 bytes of a token over the bytes of its pages: codes, scales, padding
    resident_ratio    the same over every byte that is allocated: padding page, frames and sinks as well

    Allocated bytes. pages_bytes = codes_bytes + scales_bytes + padding_bytes; resident_bytes = pages, frames, sinks
    and maps together.
    codes_bytes       of all pages, free ones and the padding page included
    scales_bytes      scales and anchors of the same pages
    padding_bytes     that fill pages up to a multiple of 16 bytes
    maps_bytes        DeltaStore's own records of each page: its sink, its requests, and its tokens if prompts are shown
    scratch_bytes     kept free within the KV budget for attention's temporaries; not allocated
    used_bytes        pages in nodes and of running requests, frames of running requests, sinks that belong to a page

    shared_tokens     of pages that two ended requests or more have used
    sinks_missed      sequences that found no free sink, and are read from packed pages alone

    Tokens that have a place in the store now (see above for logical, conversation and stored tokens).
    dedup             logical_tokens / stored_tokens = branch_dedup * prefix_dedup; 1 where nothing is stored
    branch_dedup      logical_tokens / conversation_tokens: what branches of a conversation share
    prefix_dedup      conversation_tokens / stored_tokens: what different conversations share
    fp16_unshared_bytes  logical tokens in 16-bit floats, nothing shared
    fp16_shared_bytes    stored tokens in 16-bit floats: what SGLang's own tree would hold
    times_unshared_fp16, times_shared_fp16  those two over used_bytes; 1 where nothing is stored

    requests          that have ended; prompt_tokens of them, and hit_tokens that they found stored when first admitted
    evictions         times the tree gave up nodes for room; evicted_tokens in them, and the time that took
    encoded_tokens    tokens that became codes, and the seconds spent encoding them (on a device that works behind the
                      host's back: seconds to hand the work over)
    decode_steps      steps that made one token for each running request
    decode_read_bytes bytes of stored context that those requests attended to, each request's own; a window's tiles

    nodes_total       nodes of the tree; `nodes` are those with the most hit_tokens, with all nodes above them
    history           columns of the last minutes, oldest first: time_s (Unix time), logical_tokens,
                      conversation_tokens, stored_tokens, used_bytes, pages_running, prompt_tokens, hit_tokens
    taken_at_s        Unix time of this snapshot; snapshot_seconds: what it cost the scheduler
    """

    tier: str
    format: str
    calibrated: bool
    page_tokens: int
    capacity_tokens: int
    bytes_per_token: float
    fp16_bytes_per_token: float
    ratio: float
    resident_ratio: float

    pages_bytes: int
    codes_bytes: int
    scales_bytes: int
    padding_bytes: int
    frames_bytes: int
    sinks_bytes: int
    maps_bytes: int
    resident_bytes: int
    scratch_bytes: int
    used_bytes: int

    pages_total: int
    pages_free: int
    pages_in_nodes: int
    pages_running: int
    shared_tokens: int
    frames_total: int
    frames_free: int
    frames_running: int
    sinks_total: int
    sinks_free: int
    sinks_missed: int

    contexts: int
    conversations: int
    logical_tokens: int
    conversation_tokens: int
    stored_tokens: int
    dedup: float
    branch_dedup: float
    prefix_dedup: float
    fp16_unshared_bytes: float
    fp16_shared_bytes: float
    times_unshared_fp16: float
    times_shared_fp16: float

    requests: int
    prompt_tokens: int
    hit_tokens: int
    evictions: int
    evicted_tokens: int
    eviction_seconds: float
    encoded_tokens: int
    encode_seconds: float
    decode_steps: int
    decode_read_bytes: int

    nodes_total: int
    nodes: tuple[NodeStats, ...]
    history: dict[str, list[float]]
    accounting_errors: tuple[str, ...]
    taken_at_s: float
    snapshot_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Lists, dicts, strings, numbers and booleans alone."""
        values = asdict(self)
        for node in values["nodes"]:
            node["first_token_ids"] = list(node["first_token_ids"])
        return {**values, "nodes": list(values["nodes"]), "accounting_errors": list(self.accounting_errors)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoreStats:
        nodes = (NodeStats(**{**node, "first_token_ids": tuple(node["first_token_ids"])}) for node in values["nodes"])
        errors = tuple(values["accounting_errors"])
        return cls(**{**values, "nodes": tuple(nodes), "accounting_errors": errors})
