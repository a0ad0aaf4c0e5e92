"""HiCache over packed pages: what was evicted to host memory comes back as it was, and answers as it did."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_deltastore.host.server_process import Server
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer, or_long

pytestmark = pytest.mark.slow

CAPACITY_TOKENS = 1024
PROMPT_TOKENS = 394
"""Not whole pages: what a hit computes itself is encoded as its answer fills a page, the first time as every time."""
BEGINNINGS = 12
"""First tokens of short prompts: twice as many as there are sinks, one for each running request and two."""
HOST = (
    "--max-running-requests",
    "4",
    "--enable-hierarchical-cache",
    "--hicache-ratio",
    "8",
    "--max-total-tokens",
    str(CAPACITY_TOKENS),
)


@pytest.fixture(scope="module", params=or_long(["write_through", "write_back"], ["write_through"]))
def server(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    return start_server(*DELTASTORE, *HOST, "--hicache-write-policy", request.param)


def answer(server: Server, token_ids: list[int], **body: Any) -> tuple[list[tuple[float, int]], dict[str, int]]:
    """Log-probabilities of 24 generated tokens, and where the prompt's tokens came from."""
    meta = generate(server, token_ids, 24, return_logprob=True, **body)["meta_info"]
    return [(logprob, token) for logprob, token, _ in meta["output_token_logprobs"]], meta


def test_a_hit_from_host_memory_is_the_hit_that_it_was_before_eviction(server: Server) -> None:
    token_ids = prompt(PROMPT_TOKENS, seed=1)
    answer(server, token_ids)
    hot, hot_meta = answer(server, token_ids)
    for other in range(2, 8):  # together they fill the device's pages twice
        generate(server, prompt(PROMPT_TOKENS, seed=other), 2)
    evicted = server.settled_stats()
    back, back_meta = answer(server, token_ids)
    assert back == hot
    assert hot_meta["cached_tokens"] == back_meta["cached_tokens"] > PROMPT_TOKENS - 32
    assert back_meta["cached_tokens_details"]["host"] == back_meta["cached_tokens"]
    assert evicted.accounting_errors == ()
    assert evicted.host_tokens > evicted.capacity_tokens
    assert server.settled_stats().host_loaded_tokens - evicted.host_loaded_tokens == back_meta["cached_tokens"]


def test_first_tokens_that_have_lost_their_sinks_get_them_back(server: Server) -> None:
    prompts = [[2000 + number, *prompt(41, seed=number)] for number in range(BEGINNINGS)]
    before = server.settled_stats().sink_evictions
    for token_ids in prompts:
        answer(server, token_ids)
    hot = [answer(server, token_ids) for token_ids in reversed(prompts)]  # the last ones still are, the first no more
    assert server.settled_stats().sink_evictions > before
    again = [answer(server, token_ids) for token_ids in reversed(prompts)]
    assert [found for found, _ in again] == [found for found, _ in hot]
    assert {meta["cached_tokens"] for _, meta in (*hot, *again)} == {32}
    assert sum(meta["cached_tokens_details"]["host"] for _, meta in again) > 0


def test_the_census_holds(server: Server) -> None:
    stats = server.settled_stats()
    assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
    assert stats.observation_errors == 0
    flush(server)
    stats = server.settled_stats()
    assert (stats.pages_free, stats.host_tokens) == (stats.pages_total, 0)
