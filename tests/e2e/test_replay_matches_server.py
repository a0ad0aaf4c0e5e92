"""The replay of `deltastore replay` and a real server, on the same requests: the same hits, the same pages, and what
the server says of other sizes of memory is what the replay finds there."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.fleet.agents import chained_blocks
from sglang_deltastore.fleet.formats import OWN_FORMAT, Request
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.replay import Replay, replay
from sglang_deltastore.fleet.traces import Trace
from sglang_deltastore.host.server_process import Server
from sglang_deltastore.observe.stats import StoreStats
from tests.budgets import SAMPLED_HIT_RATE
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

REQUESTS, PAGE_TOKENS, CAPACITY_TOKENS, CHUNK_TOKENS = 300, 16, 3072, 128
#: conversations that may go on: far more than fit, so that memory makes a difference
LATEST = 100


@dataclass(frozen=True)
class Recorded:
    """The requests as a trace, the tokens that each has found stored, and the server's facts after the last one."""

    trace: Trace
    hits: list[int]
    stats: StoreStats


@pytest.fixture(scope="module")
def recorded(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Conversations of several turns behind four shared prefixes, one request at a time, in a pool that overflows."""
    server = start_server(
        *DELTASTORE,
        *("--kv-compress-tier", "conservative", "--max-total-tokens", str(CAPACITY_TOKENS)),
        *("--chunked-prefill-size", str(CHUNK_TOKENS), "--max-running-requests", "4"),
    )
    flush(server)
    trace_path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    hits = serve_and_record(server, trace_path)
    return Recorded(Trace(trace_path, page_tokens=PAGE_TOKENS), hits, server.store_stats())


def hit_tokens(cache: Cache, request: Request) -> int:
    running = cache.admit(request)
    assert running is not None
    cache.prefilled(running)
    cache.finish(running)
    return running.hit_pages * PAGE_TOKENS


def test_hits_and_pages_are_the_servers(recorded: Recorded) -> None:
    stats, served_hits = recorded.stats, recorded.hits
    assert stats.pages_total == CAPACITY_TOKENS // PAGE_TOKENS

    cache = Cache(stats.pages_total, PAGE_TOKENS, chunk_tokens=CHUNK_TOKENS)
    replayed_hits = [hit_tokens(cache, request) for request in recorded.trace]
    assert cache.tree.evicted_pages > stats.pages_total, "too little was evicted: this tested nothing"
    assert 0.2 < sum(served_hits) / sum(request.prompt_tokens for request in recorded.trace) < 0.9
    assert replayed_hits == served_hits
    assert cache.tree.pages == stats.pages_in_nodes


def test_the_server_knows_the_hit_rate_of_other_sizes(recorded: Recorded) -> None:
    stats = recorded.stats
    live = {
        0.5: stats.hit_rate_0_5x, 1.0: stats.hit_rate_1x, 2.0: stats.hit_rate_2x, 4.0: stats.hit_rate_4x,
    }  # fmt: skip
    caches = [Cache(int(stats.pages_total * size), PAGE_TOKENS, chunk_tokens=CHUNK_TOKENS) for size in live]
    outcomes = replay(recorded.trace, [Replay(cache) for cache in caches])
    replayed = {size: outcome.hit_rate for size, outcome in zip(live, outcomes, strict=True)}
    print(f"live {live}, replayed {replayed}")
    assert stats.hit_rate_prompt_tokens == outcomes[0].prompt_tokens
    assert stats.hit_rate_1x == pytest.approx(sum(recorded.hits) / outcomes[0].prompt_tokens, abs=1e-9)
    assert replayed[4.0] - replayed[0.5] > 5 * SAMPLED_HIT_RATE, "memory makes no difference: this tested nothing"
    for size, rate in live.items():
        assert rate == pytest.approx(replayed[size], abs=SAMPLED_HIT_RATE), size


@pytest.mark.long
def test_hits_in_host_memory_are_the_servers_but_for_a_few(start_server: StartServer, tmp_path: Path) -> None:
    """What the server finds on the device and behind it together. Some are not the replay's: what is loaded takes the
    place of other pages a moment before what is computed does."""
    pages, times, asked = 96, 2, 100
    server = start_server(
        *DELTASTORE,
        *("--kv-compress-tier", "conservative", "--max-total-tokens", str(pages * PAGE_TOKENS)),
        *("--chunked-prefill-size", str(CHUNK_TOKENS), "--max-running-requests", "4", "--enable-hierarchical-cache"),
        *("--hicache-ratio", str(times), "--hicache-write-policy", "write_through"),
    )
    flush(server)
    served = serve_and_record(server, tmp_path / "trace.jsonl", asked)
    alone, behind = (Cache(pages * each, PAGE_TOKENS, chunk_tokens=CHUNK_TOKENS) for each in (1, times))
    found = [
        max(hit_tokens(cache, request) for cache in (alone, behind))
        for request in Trace(tmp_path / "trace.jsonl", page_tokens=PAGE_TOKENS)
    ]
    assert alone.tree.evicted_pages > behind.tree.evicted_pages > pages
    assert sum(one != other for one, other in zip(found, served, strict=True)) <= asked // 20
    assert sum(found) == pytest.approx(sum(served), rel=0.02)


def serve_and_record(server: Server, trace_path: Path, asked: int = REQUESTS) -> list[int]:
    """Send the requests, write them as a trace, return the tokens that each hit."""
    pick = random.Random(7)
    shared = [prompt(length, seed=length) for length in (37, 96, 160, 250)]
    conversations: list[list[int]] = []
    block_ids: dict[tuple[int, tuple[int, ...]], int] = {}
    hits = []
    with open(trace_path, "w") as trace:
        trace.write(json.dumps({"format": OWN_FORMAT, "block_tokens": PAGE_TOKENS}) + "\n")
        for number in range(asked):
            if not conversations or pick.random() < 0.3:
                tokens = [*pick.choice(shared), *prompt(pick.randint(1, 90), seed=1000 + number)]
            elif pick.random() < 0.1:
                tokens = pick.choice(conversations)  # the very same prompt again
            else:
                tokens = [*pick.choice(conversations[-LATEST:]), *prompt(pick.randint(1, 60), seed=2000 + number)]
            answer = generate(server, tokens, tokens=pick.choice((1, 1, 2, 5, 17)))
            hits.append(answer["meta_info"]["cached_tokens"])
            whole = [*tokens, *answer["output_ids"]]
            stored = chained_blocks(whole[:-1], block_ids)
            record = {"time_s": float(number), "prompt_tokens": len(tokens), "answer_tokens": len(answer["output_ids"])}
            record |= {"blocks": stored[: len(tokens) // PAGE_TOKENS], "stored_blocks": stored}
            trace.write(json.dumps(record) + "\n")
            if len(whole) < 450:
                conversations.append(whole)
    return hits
