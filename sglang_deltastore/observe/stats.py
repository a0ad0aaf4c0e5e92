"""The table of facts about a running store: each field with its unit, what it says, and the series that shows it.

JSON, Prometheus, `deltastore top`, the dashboard's explanations and Grafana's descriptions follow from it.

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

from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import msgspec


@dataclass(frozen=True)
class Fact:
    """What a field says, and how Prometheus shows it.

    series: "gauge" or "counter", "" for none; name: of the series without prefix, "" for the field's own; label: its
    (name, value), where several fields make one series.
    """

    help: str
    unit: str = ""
    series: str = ""
    name: str = ""
    label: tuple[str, str] | None = None


def pages(state: str, help: str) -> Fact:
    return Fact(help, "pages", "gauge", "pages", ("state", state))


def resident(kind: str, help: str) -> Fact:
    return Fact(help, "bytes", "gauge", "resident_bytes", ("kind", kind))


def hit_rate(memory: str, what: str) -> Fact:
    return Fact(f"share of recent prompts' tokens {what}", "", "gauge", "hit_rate", ("memory", memory))


def gauge(help: str, unit: str = "") -> Fact:
    return Fact(help, unit, "gauge")


def counter(help: str, unit: str = "") -> Fact:
    return Fact(help, unit, "counter")


class NodeStats(msgspec.Struct, frozen=True, kw_only=True):
    """A node: a stretch of stored tokens that the same contexts share. SGLang cuts it where contexts part, and where
    prompts end."""

    id: Annotated[int, Fact("SGLang's number of the node; never used again")]
    parent: Annotated[int, Fact("id of the node before it; 0: contexts begin here")]
    start_tokens: Annotated[int, Fact("tokens before it in its contexts", "tokens")]
    tokens: Annotated[int, Fact("its own", "tokens")]
    contexts: Annotated[int, Fact("that contain it, each of which would store it by itself")]
    conversations: Annotated[int, Fact("that contain it")]
    running: Annotated[int, Fact("requests that read it now")]
    requests: Annotated[int, Fact("that have ended with it in their context, since it was stored")]
    hits: Annotated[int, Fact("those of them that found it stored, and did not compute it")]
    hit_tokens: Annotated[int, Fact("that requests found stored here: hits x tokens", "tokens")]
    children: Annotated[int, Fact("nodes that go on from it")]
    subtree_tokens: Annotated[int, Fact("its own and those of all nodes below", "tokens")]
    first_token_ids: Annotated[
        tuple[int, ...], Fact("the first page's, only with --kv-compress-show-prompts and where they are known")
    ] = ()
    text: Annotated[str, Fact("the same as text, added by the HTTP server where it has a tokenizer")] = ""


class CanaryPart(msgspec.Struct, frozen=True, kw_only=True):
    """Compared tokens of answers that have something in common."""

    tokens: Annotated[int, Fact("that were compared", "tokens")]
    kl_mean: Annotated[float, Fact("KL(raw || served) of a token; 0 where none was compared", "nats")]
    top1_agreement: Annotated[float, Fact("share whose most likely token is the same; 1 where none was compared")]
    kl_worst: Annotated[float, Fact("of the token where it is largest", "nats")]


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. Byte counts cover all layers; counts of what happened go back to the server's start."""

    replica: Annotated[int, Fact("of --data-parallel-size: whose store this is, from 0")]
    tier: Annotated[str, Fact("what --kv-compress-tier says")]
    format: Annotated[
        str,
        Fact("of all layers, or their mean bits where a calibration deals them out; of a tier with levels, of each"),
    ]
    calibrated: Annotated[bool, Fact("whether a calibration is in force")]
    page_tokens: Annotated[int, Fact("tokens of a page", "tokens")]
    capacity_tokens: Annotated[int, gauge("Tokens that all pages hold.", "tokens")]
    bytes_per_token: Annotated[
        float,
        Fact(
            "of pages: codes, scales, padding; of layers with pages behind windows freed, their share; of a tier with "
            "levels, of coarse pages",
            "bytes",
        ),
    ]
    fp16_bytes_per_token: Annotated[float, Fact("the same in SGLang's own pool of 16-bit floats", "bytes")]
    ratio: Annotated[float, gauge("fp16_bytes_per_token over bytes_per_token.")]
    resident_ratio: Annotated[
        float, gauge("The same over every byte that is allocated: padding page, frames and sinks as well.")
    ]

    pages_bytes: Annotated[int, Fact("of all pages: codes_bytes + scales_bytes + padding_bytes", "bytes")]
    codes_bytes: Annotated[int, resident("codes", "of all pages, free ones and the padding page included")]
    scales_bytes: Annotated[int, resident("scales", "scales and anchors of the same pages")]
    padding_bytes: Annotated[int, resident("padding", "that fill pages up to a multiple of 16 bytes")]
    frames_bytes: Annotated[int, resident("frames", "unfinished tiles of requests that may run at once")]
    sinks_bytes: Annotated[int, resident("sinks", "first tokens of sequences, kept raw")]
    maps_bytes: Annotated[int, resident("maps", "which sink a frame's request reads")]
    resident_bytes: Annotated[int, Fact("allocated: pages, frames, sinks and maps together", "bytes")]
    scratch_bytes: Annotated[
        int, Fact("kept free within the KV budget for attention's temporaries; not allocated", "bytes")
    ]
    draft_pool_bytes: Annotated[int, Fact("a draft model's own KV, out of the same budget; SGLang's own pool", "bytes")]
    used_bytes: Annotated[
        int,
        gauge(
            "Bytes of pages in nodes and of running requests, of their frames, and of sinks that are not free.",
            "bytes",
        ),
    ]

    pages_total: Annotated[int, Fact("that requests may own", "pages")]
    pages_free: Annotated[int, pages("free", "that nobody owns")]
    pages_in_nodes: Annotated[int, pages("in_nodes", "of the radix tree")]
    pages_held: Annotated[
        int,
        gauge("Pages in nodes that cannot be evicted: running requests read them, or copies to host memory.", "pages"),
    ]
    pages_running: Annotated[int, pages("running", "of running requests, beside those they share with nodes")]
    window_pages_total: Annotated[
        int, Fact("of layers with a window behind which pages are freed, that requests may own; 0: none are", "pages")
    ]
    window_pages_free: Annotated[int, gauge("Pages of such layers that nobody owns.", "pages")]
    window_pages_in_nodes: Annotated[int, gauge("Pages of such layers in nodes of the radix tree.", "pages")]
    window_pages_running: Annotated[
        int, gauge("Pages of such layers of running requests, beside those they share with nodes.", "pages")
    ]
    shared_tokens: Annotated[int, gauge("Tokens of nodes that two ended requests or more have used.", "tokens")]
    untracked_tokens: Annotated[
        int,
        gauge(
            "Tokens of the tree whose nodes the facts have lost sight of; they come back as they are used.", "tokens"
        ),
    ]
    frames_total: Annotated[int, Fact("requests that may run at once")]
    frames_free: Annotated[int, gauge("Frames that no running request holds.")]
    frames_running: Annotated[int, Fact("of running requests")]
    coarse_tokens: Annotated[
        int, gauge("Stored tokens of whole pages that are coarse, of a tier with levels.", "tokens")
    ]
    demoted_tokens: Annotated[int, counter("Tokens that were encoded again, coarser, for room.", "tokens")]
    demotion_seconds: Annotated[float, counter("Seconds that took.", "s")]
    sinks_total: Annotated[int, Fact("one for every frame, and one for every 32 pages")]
    sinks_free: Annotated[int, gauge("Sinks of which no running or stored sequence has the first token.")]
    sink_evictions: Annotated[
        int, counter("First tokens whose stored sequences were evicted, as another first token had no sink.", "tokens")
    ]

    host_capacity_tokens: Annotated[int, gauge("Tokens that fit into host memory, as pages (HiCache).", "tokens")]
    host_tokens: Annotated[int, gauge("Tokens there, those included that the device holds as well.", "tokens")]
    host_bytes: Annotated[int, gauge("Host memory that is allocated for pages and sinks.", "bytes")]
    host_loaded_tokens: Annotated[int, counter("Tokens that came back from there instead of being computed.", "tokens")]
    storage_loaded_pages: Annotated[int, counter("Pages that came to host memory from the storage behind it.", "pages")]
    storage_written_pages: Annotated[int, counter("Pages that were written there and were not there before.", "pages")]
    storage_refused_pages: Annotated[
        int, counter("Stored pages that were not whole, or not this store's: misses, computed anew.", "pages")
    ]

    contexts: Annotated[int, gauge("Running requests, and ended ones that no longer stored context continues.")]
    conversations: Annotated[int, gauge("Contexts, those counted once that continue the same prompt.")]
    logical_tokens: Annotated[int, gauge("Tokens of all contexts, each by itself.", "tokens")]
    conversation_tokens: Annotated[
        int, gauge("Tokens of all conversations, each by itself, its branches sharing.", "tokens")
    ]
    stored_tokens: Annotated[int, gauge("Tokens in the store, each once.", "tokens")]
    dedup: Annotated[
        float, gauge("Logical tokens over stored tokens: branch_dedup x prefix_dedup; 1 where nothing is stored.")
    ]
    branch_dedup: Annotated[
        float, gauge("Logical tokens over conversation tokens: what branches of a conversation share.")
    ]
    prefix_dedup: Annotated[float, gauge("Conversation tokens over stored tokens: what different conversations share.")]
    fp16_unshared_bytes: Annotated[float, gauge("Bytes of the logical tokens in fp16, nothing shared.", "bytes")]
    fp16_shared_bytes: Annotated[float, gauge("Bytes of the stored tokens in fp16: SGLang's own tree.", "bytes")]
    times_unshared_fp16: Annotated[float, gauge("fp16_unshared_bytes over used_bytes; 1 where nothing is stored.")]
    times_shared_fp16: Annotated[float, gauge("fp16_shared_bytes over used_bytes; 1 where nothing is stored.")]

    requests: Annotated[int, counter("Requests that have ended.", "requests")]
    prompt_tokens: Annotated[int, counter("Prompt tokens of requests that have ended.", "tokens")]
    hit_tokens: Annotated[int, counter("Prompt tokens that they found stored when first admitted.", "tokens")]
    hit_coarse_tokens: Annotated[int, counter("Of them those in coarse pages.", "tokens")]
    hit_rate_0_25x: Annotated[float, hit_rate("0.25", "that a quarter of the device's KV memory would have had stored")]
    hit_rate_0_5x: Annotated[float, hit_rate("0.5", "that half of it would have had stored")]
    hit_rate_1x: Annotated[float, hit_rate("1", "that the device had stored, host memory left out")]
    hit_rate_2x: Annotated[float, hit_rate("2", "that twice its KV memory would have had stored")]
    hit_rate_4x: Annotated[float, hit_rate("4", "that four times as much would have had stored")]
    hit_rate_8x: Annotated[float, hit_rate("8", "that eight times as much would have had stored")]
    hit_rate_prompt_tokens: Annotated[int, Fact("of the recent requests that the hit rates are about", "tokens")]
    evictions: Annotated[int, counter("Times the tree gave up nodes for room.")]
    evicted_tokens: Annotated[int, counter("Tokens in them.", "tokens")]
    eviction_seconds: Annotated[float, counter("Seconds that took.", "s")]
    encoded_tokens: Annotated[int, counter("Tokens that became codes.", "tokens")]
    decode_steps: Annotated[int, counter("Steps that made one token for each running request.", "steps")]
    decode_read_bytes: Annotated[
        int,
        counter(
            "Bytes of stored context that decode attended to, each request's own; a window's whole tiles; of a tier "
            "with levels as if all were coarse.",
            "bytes",
        ),
    ]
    calibration_staleness: Annotated[
        float,
        gauge(
            "What recent queries see of the errors of stored keys, over what they would see with a calibration on "
            "themselves, mean of the layers: 1 is as good as new; 0 without calibration, or while too few were seen."
        ),
    ]
    worst_layer_staleness: Annotated[float, gauge("The same of the layer where it is largest.")]
    recalibration_pays: Annotated[
        bool, Fact("calibration_staleness is 1.75 or more: calibrate again, on text like what is served, as long")
    ]

    canary_share: Annotated[float, Fact("of requests that are sampled: what --kv-compress-canary says")]
    canary_sequences: Annotated[
        int, counter("Sampled sequences that were run once more with raw attention, and compared.", "sequences")
    ]
    canary_tokens: Annotated[int, counter("Answered tokens whose distributions were compared.", "tokens")]
    canary_kl_nats: Annotated[
        float, Fact("sum of their KL(raw || served), over the 20 most likely and the rest", "nats")
    ]
    canary_kl_mean: Annotated[
        float, gauge("Mean KL(raw || served) of a compared token; 0 where there is none.", "nats")
    ]
    canary_kl_worst: Annotated[float, gauge("The same of the token where it is largest.", "nats")]
    canary_top1_agreement: Annotated[
        float, gauge("Share of compared tokens whose most likely token is the same; 1 where there is none.")
    ]
    canary_by_hit: Annotated[
        dict[str, CanaryPart], Fact("the same by the share of the prompt that was a hit: up to 0%, 50%, 90%, 100%")
    ]
    canary_by_context: Annotated[
        dict[str, CanaryPart], Fact("the same by tokens of prompt and answer: up to 1K, 4K, 16K, more")
    ]
    canary_seconds: Annotated[float, counter("Seconds that running sequences again took.", "s")]
    canary_waiting: Annotated[int, Fact("sampled sequences that wait to be run again", "sequences")]
    canary_too_long: Annotated[
        int, counter("Sampled requests longer than one pass of the server (its --chunked-prefill-size).", "requests")
    ]
    canary_not_comparable: Annotated[
        int, counter("Sampled requests with images or embeddings, which are not run again.", "requests")
    ]
    canary_overtaken: Annotated[
        int, counter("Sampled requests that were left out because there was no idle time for them.", "requests")
    ]

    nodes_total: Annotated[
        int, gauge("Nodes of the radix tree, halves of one that only a match has split counted once.", "nodes")
    ]
    nodes: Annotated[tuple[NodeStats, ...], Fact("those with the most hit_tokens, with all nodes above them")]
    history: Annotated[
        dict[str, list[float]],
        Fact("columns of the last minutes, oldest first; time_s is Unix time, the others are fields of this table"),
    ]
    accounting_errors: Annotated[
        tuple[str, ...], Fact("pages and frames without an owner, or with two; empty where all is well")
    ]
    census_current: Annotated[
        bool, Fact("whether every page was looked at (not only counted) since the store last changed")
    ]
    census_age_s: Annotated[float, Fact("since every page was looked at; -1: never", "s")]
    observation_errors: Annotated[
        int, counter("Times that observing failed, and serving went on; the log has the first of each kind.")
    ]
    taken_at_s: Annotated[float, Fact("Unix time of this snapshot", "s")]
    snapshot_seconds: Annotated[float, Fact("what it cost the scheduler", "s")]

    def as_dict(self) -> dict[str, Any]:
        """Lists, dicts, strings, numbers and booleans alone."""
        return msgspec.json.decode(msgspec.json.encode(self), type=dict[str, Any])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoreStats:
        return msgspec.convert(values, cls)


def table(of: type[msgspec.Struct] = StoreStats) -> dict[str, Fact]:
    """Each field's row, in order."""
    hints = get_type_hints(of, include_extras=True)
    return {
        name: next(part for part in get_args(hints[name]) if isinstance(part, Fact)) for name in of.__struct_fields__
    }
