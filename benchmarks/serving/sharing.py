"""What sharing stores: bytes in a server's tree against fp16 without sharing, and against stock SGLang's tree.

Users with a common prefix of 12, 50, 75 and 87% of their context, and recorded conversations, each request really sent.
Bytes and tokens come from `/deltastore/stats`; tokens are counted once more from the prompts' ids, and both must agree.
Bytes are linear in the context's length, so short contexts show what long ones would.

    stored          pages in nodes, their sinks
    fp16, unshared  every context that nobody continues, by itself in 16 bits
    fp16, shared    every distinct page once in 16 bits: stock SGLang's tree at the same page size
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_deltastore.host.server_process import Server, serve
from sglang_deltastore.observe.stats import StoreStats

from .client import flush
from .runner import run_slice, slices
from .sides import PAGE_TOKENS, Geometry
from .tree_count import TokenTree, tree_of
from .workloads import Prompt, Request, Texts, WorkloadError

PUBLISHED = {0.12: 6.7, 0.50: 31.0, 0.75: 55.0, 0.87: 62.0}
"""Share of each context that is common -> times less than fp16 without sharing, as published for DeltaStore (K4V2, 100
users, 4K context, 72B). A common half can be stored once, the other half cannot: two times less, before the codec."""
USERS = 100
QUICK_CONTEXT_TOKENS, CONTEXT_TOKENS = 256, 512
TRANSCRIPTS = ("airline", "tools", "branches")
"""Workloads with recorded turns."""
_AT_ONCE = 4


def measure(
    texts: Texts, transcripts: Mapping[str, Sequence[Request]], model: str | Path, tier: str, folder: Path, quick: bool
) -> list[dict[str, Any]]:
    """Rows of benchmarks `sharing` and `transcripts`. Raises RuntimeError where server and client count differently."""
    context_tokens = QUICK_CONTEXT_TOKENS if quick else CONTEXT_TOKENS
    cases: dict[str, Sequence[Request]] = {
        str(share): users(texts, share, context_tokens) for share in PUBLISHED
    } | dict(transcripts)
    trees = {name: tree_of((request.prompt for request in requests), PAGE_TOKENS) for name, requests in cases.items()}
    capacity_pages = max(tree.pages for tree in trees.values()) + _AT_ONCE * 8192 // PAGE_TOKENS
    options = (
        "--device", "cpu", "--dtype", "float32", "--page-size", str(PAGE_TOKENS), "--sleep-on-idle",
        "--max-running-requests", str(_AT_ONCE), "--max-total-tokens", str(capacity_pages * PAGE_TOKENS),
        "--kv-compress", "deltastore", "--kv-compress-tier", tier, "--kv-compress-calibration", "none",
    )  # fmt: skip
    rows = []
    with serve(model, options, log_path=folder / f"{tier}.log") as server:
        for name, requests in cases.items():
            stats = _send(server, requests, name)
            counted = _counted(stats, trees[name], Geometry.of(model).store_size(tier, _AT_ONCE).page_bytes)
            common = {"model": Path(model).name, "tier": tier, "requests": len(requests), **counted}
            if name in transcripts:
                rows.append({"benchmark": "transcripts", "workload": name, **common, **_temporal(stats, trees[name])})
            else:
                shape = {"prefix_share": float(name), "users": USERS, "context_tokens": context_tokens}
                rows.append({"benchmark": "sharing", **shape, **common, "published_times": PUBLISHED[float(name)]})
    return rows


def users(texts: Texts, share: float, context_tokens: int) -> list[Request]:
    """One request of each user: a common prefix of whole pages, then text of its own."""
    agent = texts.json("tau_bench/airline_policy_tools.json")
    prefix = texts.tokens(agent["policy"])[: round(share * context_tokens / PAGE_TOKENS) * PAGE_TOKENS]
    own_tokens = context_tokens - len(prefix)
    spoken = (
        turn["user"] + turn["bot"] for row in texts.rows("chat/mt_bench_101.jsonl.zst") for turn in row["history"]
    )
    stream: Prompt = []
    for text in spoken:
        stream += texts.tokens(text)
        if len(stream) >= USERS * own_tokens:
            break
    else:
        raise WorkloadError(f"chat/: {len(stream)} tokens; {USERS} users of {context_tokens} need {USERS * own_tokens}")
    return [
        Request(user, prefix + stream[user * own_tokens : (user + 1) * own_tokens], answer_tokens=1)
        for user in range(USERS)
    ]


def _send(server: Server, requests: Sequence[Request], name: str) -> StoreStats:
    flush(server.url)
    with tqdm(total=len(requests), desc=name, unit="request", file=sys.stderr) as bar:
        for some in slices(requests):
            run_slice(server.url, some, _AT_ONCE)
            bar.update(len(some))
    return server.settled_stats()


def _counted(stats: StoreStats, tree: TokenTree, page_bytes: int) -> dict[str, Any]:
    """The server's figures, once they agree with the client's count."""
    sinks = stats.sinks_total - stats.sinks_free
    sink_bytes = stats.sinks_bytes // (stats.sinks_total + 1)
    fp16 = stats.fp16_bytes_per_token * PAGE_TOKENS
    expected = {
        "stored_tokens": tree.pages * PAGE_TOKENS,
        "logical_tokens": tree.leaf_paths_pages * PAGE_TOKENS,
        "used_bytes": tree.pages * page_bytes + sinks * sink_bytes,
        "fp16_shared_bytes": tree.pages * fp16,
        "fp16_unshared_bytes": tree.leaf_paths_pages * fp16,
        "accounting_errors": (),
        "census_current": True,
    }
    found = {name: getattr(stats, name) for name in expected}
    if found != expected:
        raise RuntimeError(f"the server counts {found}; its requests' token ids make {expected}")
    return {
        "stored_bytes": stats.used_bytes,
        "fp16_unshared_bytes": stats.fp16_unshared_bytes,
        "fp16_shared_bytes": stats.fp16_shared_bytes,
        "times_unshared_fp16": stats.fp16_unshared_bytes / stats.used_bytes,
        "times_shared_fp16": stats.fp16_shared_bytes / stats.used_bytes,
    }


def _temporal(stats: StoreStats, tree: TokenTree) -> dict[str, Any]:
    """What turns, repeats and branches add."""
    every_prompt_bytes = tree.asked_pages * PAGE_TOKENS * stats.fp16_bytes_per_token
    return {**asdict(tree.sharing()), "times_every_prompt_fp16": every_prompt_bytes / stats.used_bytes}
