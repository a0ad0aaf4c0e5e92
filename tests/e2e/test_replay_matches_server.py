"""The replay of `deltastore replay` and a real server, on the same requests: the same hits, the same pages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sglang_deltastore.fleet.formats import OWN_FORMAT
from sglang_deltastore.fleet.page_pool import Cache
from sglang_deltastore.fleet.traces import Trace
from sglang_deltastore.host.server_process import Server
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

REQUESTS, PAGE_TOKENS, CAPACITY_TOKENS, CHUNK_TOKENS = 300, 16, 3072, 128


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(
        *DELTASTORE,
        *("--kv-compress-tier", "conservative", "--max-total-tokens", str(CAPACITY_TOKENS)),
        *("--chunked-prefill-size", str(CHUNK_TOKENS), "--max-running-requests", "4"),
    )


def test_hits_and_pages_are_the_servers(server: Server, tmp_path: Path) -> None:
    """Conversations of several turns behind four shared prefixes, one request at a time, in a pool that overflows."""
    flush(server)
    trace_path = tmp_path / "trace.jsonl"
    served_hits = serve_and_record(server, trace_path)
    stats = server.store_stats()
    assert stats.pages_total == CAPACITY_TOKENS // PAGE_TOKENS

    cache = Cache(stats.pages_total, PAGE_TOKENS, chunk_tokens=CHUNK_TOKENS)
    replayed_hits = []
    for request in Trace(trace_path, page_tokens=PAGE_TOKENS):
        running = cache.admit(request)
        assert running is not None
        replayed_hits.append(running.hit_pages * PAGE_TOKENS)
        cache.prefilled(running)
        cache.finish(running)

    assert cache.tree.evicted_pages > stats.pages_total, "too little was evicted: this tested nothing"
    assert 0.2 < sum(served_hits) / sum(request.prompt_tokens for request in Trace(trace_path)) < 0.9
    assert replayed_hits == served_hits
    assert cache.tree.pages == stats.pages_in_nodes


def serve_and_record(server: Server, trace_path: Path) -> list[int]:
    """Send the requests, write them as a trace, return the tokens that each hit."""
    pick = random.Random(7)
    shared = [prompt(length, seed=length) for length in (37, 96, 160, 250)]
    conversations: list[list[int]] = []
    block_ids: dict[tuple[int, tuple[int, ...]], int] = {}
    hits = []
    with open(trace_path, "w") as trace:
        trace.write(json.dumps({"format": OWN_FORMAT, "block_tokens": PAGE_TOKENS}) + "\n")
        for number in range(REQUESTS):
            if not conversations or pick.random() < 0.3:
                tokens = [*pick.choice(shared), *prompt(pick.randint(1, 90), seed=1000 + number)]
            elif pick.random() < 0.1:
                tokens = pick.choice(conversations)  # the very same prompt again
            else:
                tokens = [*pick.choice(conversations[-6:]), *prompt(pick.randint(1, 60), seed=2000 + number)]
            answer = generate(server, tokens, tokens=pick.choice((1, 1, 2, 5, 17)))
            hits.append(answer["meta_info"]["cached_tokens"])
            whole = [*tokens, *answer["output_ids"]]
            stored = chained_ids(whole[:-1], block_ids)
            record = {"time_s": float(number), "prompt_tokens": len(tokens), "answer_tokens": len(answer["output_ids"])}
            record |= {"blocks": stored[: len(tokens) // PAGE_TOKENS], "stored_blocks": stored}
            trace.write(json.dumps(record) + "\n")
            if len(whole) < 450:
                conversations.append(whole)
    return hits


def chained_ids(tokens: list[int], block_ids: dict[tuple[int, tuple[int, ...]], int]) -> list[int]:
    """Ids of whole pages: equal for equal tokens after an equal prefix."""
    ids, parent = [], -1
    for start in range(0, len(tokens) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
        page = (parent, tuple(tokens[start : start + PAGE_TOKENS]))
        parent = block_ids.setdefault(page, len(block_ids))
        ids.append(parent)
    return ids
