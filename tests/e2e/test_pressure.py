"""A pool far too small, clients that hang up: nothing is lost, nobody else notices."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from sglang_deltastore.host.server_process import Server, stop
from tests.e2e import draft_heads
from tests.e2e.client import ANSWER_TIMEOUT_S, flush, prompt
from tests.e2e.conftest import DELTASTORE, NGRAM, StartServer, draft_model, or_long

pytestmark = pytest.mark.slow

REQUESTS, CONCURRENCY, CAPACITY_TOKENS = 50, 8, 1024

HOST_MEMORY = ("--enable-hierarchical-cache", "--hicache-ratio", "2", "--hicache-write-policy", "write_through")
ADAPTIVE = ("--kv-compress-tier", "adaptive")
HEAD = ("an EAGLE head",)
"""In place of arguments, which name a folder of the test's."""

UNDER_PRESSURE = {
    "device": (),
    "device and host": HOST_MEMORY,
    "drafts": NGRAM,
    "drafts, device and host": (*HOST_MEMORY, *NGRAM),
    "drafts of a head": HEAD,
    "levels": ADAPTIVE,
    "drafts, levels": (*ADAPTIVE, *NGRAM),
}
#: the others are in these
ALL_AT_ONCE = ("device", "drafts, device and host", "drafts of a head", "drafts, levels")


@pytest.fixture(scope="module", params=or_long(list(UNDER_PRESSURE), ALL_AT_ONCE))
def server(
    request: pytest.FixtureRequest, start_server: StartServer, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    arguments = UNDER_PRESSURE[request.param]
    if arguments is HEAD:
        arguments = draft_model(draft_heads.echo(smollm2, tmp_path_factory.mktemp("head")), "EAGLE")
    server = start_server(
        *DELTASTORE,
        *("--kv-compress-tier", "conservative", *arguments, "--max-total-tokens", str(CAPACITY_TOKENS)),
        *("--max-running-requests", str(CONCURRENCY), "--chunked-prefill-size", "128"),
        # Admit as if answers were short, so that the pool runs full while requests run.
        *("--schedule-conservativeness", "0.05"),
        environ={**os.environ, "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},
    )
    yield server
    stop(server.process)  # the next one needs its memory


def answer(server: Server, number: int) -> int:
    """Stream request `number`; every fourth client hangs up after 3 tokens. Returns tokens received."""
    hangs_up, wanted = number % 4 == 0, 90 + 7 * number % 60
    # Groups of five share the first 64 tokens; lengths from 66 to 165.
    tokens = prompt(64, seed=number // 5) + prompt(2 + 37 * number % 100, seed=100 + number)
    sampling = {"temperature": 0, "max_new_tokens": wanted, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling, "stream": True}
    received = 0
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=ANSWER_TIMEOUT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                received = json.loads(line[6:])["meta_info"]["completion_tokens"]
                if hangs_up and received >= 3:
                    return received
    assert received == wanted, f"request {number} got {received} of {wanted} tokens"
    return received


def test_aborts_evictions_and_retractions_lose_nothing(server: Server) -> None:
    with ThreadPoolExecutor(CONCURRENCY) as clients:
        received = list(clients.map(lambda number: answer(server, number), range(REQUESTS)))
    assert len(received) == REQUESTS

    log = server.log_path.read_text()
    assert "Retract requests" in log, "the pool never ran full: this test tested nothing"
    flush_waits_until_idle(server)
    stats = server.settled_stats()
    # More was stored than fits: nodes were evicted.
    assert stats.encoded_tokens > 2 * CAPACITY_TOKENS
    assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
    assert stats.observation_errors == 0
    assert bool(stats.demoted_tokens) == (stats.tier == "adaptive")
    assert stats.pages_free == stats.pages_total == CAPACITY_TOKENS // 16
    assert stats.frames_free == stats.frames_total == CONCURRENCY
    assert server.is_healthy()


def flush_waits_until_idle(server: Server) -> None:
    before = server.settled_stats()
    assert (before.census_current, before.accounting_errors, before.untracked_tokens) == (True, (), 0)
    flush(server)
