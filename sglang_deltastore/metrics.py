"""Names of the Prometheus series, and the fields of `stats.StoreStats` they show."""

from __future__ import annotations

PREFIX = "deltastore:"

#: label `state` of deltastore:pages -> field pages_STATE
PAGE_STATES = ("free", "in_nodes", "running")

#: label `kind` of deltastore:resident_bytes -> field KIND_bytes
BYTES_KINDS = ("codes", "scales", "padding", "frames", "sinks", "maps")

#: field, and name of the series
GAUGES = {
    "ratio": "Bytes of a token in fp16 over the bytes of its pages.",
    "resident_ratio": "The same over every allocated byte.",
    "used_bytes": "Bytes of pages in nodes and of running requests, of their frames, and of sinks in use.",
    "capacity_tokens": "Tokens that all pages hold.",
    "contexts": "Running requests, and ended ones that no longer stored context continues.",
    "conversations": "Contexts, those counted once that continue the same prompt.",
    "logical_tokens": "Tokens of all contexts, each by itself.",
    "conversation_tokens": "Tokens of all conversations, each by itself, its branches sharing.",
    "stored_tokens": "Tokens in the store, each once.",
    "dedup": "Logical tokens over stored tokens.",
    "branch_dedup": "Logical tokens over conversation tokens.",
    "prefix_dedup": "Conversation tokens over stored tokens.",
    "fp16_unshared_bytes": "Bytes of the logical tokens in fp16, nothing shared.",
    "fp16_shared_bytes": "Bytes of the stored tokens in fp16: SGLang's own tree.",
    "times_unshared_fp16": "fp16_unshared_bytes over used_bytes.",
    "times_shared_fp16": "fp16_shared_bytes over used_bytes.",
    "shared_tokens": "Tokens of pages that two ended requests or more have used.",
    "nodes_total": "Nodes of the radix tree.",
    "frames_free": "Frames that no running request holds.",
    "sinks_free": "Sinks that no page has.",
}

#: field -> help; the series is called FIELD_total
COUNTERS = {
    "requests": "Requests that have ended.",
    "prompt_tokens": "Prompt tokens of requests that have ended.",
    "hit_tokens": "Prompt tokens that they found stored.",
    "evictions": "Times the tree gave up nodes for room.",
    "evicted_tokens": "Tokens in them.",
    "eviction_seconds": "Seconds that took.",
    "encoded_tokens": "Tokens that became codes.",
    "encode_seconds": "Seconds spent encoding them.",
    "decode_steps": "Decode steps.",
    "decode_read_bytes": "Bytes of stored context that decode attended to.",
    "sinks_missed": "Sequences that found no free sink.",
}
