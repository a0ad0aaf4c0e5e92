"""Tier adaptive on a real server: what is cold gives up bits, and what fits as conservative is not evicted."""

from __future__ import annotations

import pytest

from sglang_deltastore.host.server_process import Server, stop
from tests import budgets
from tests.e2e.client import flush, generate, prompt, score
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

PROMPT_TOKENS, PROMPTS, CAPACITY_TOKENS = 176, 5, 1024
"""880 tokens: as conservative they fit, as lossless 736 would."""


def serve(start_server: StartServer, tier: str, capacity_tokens: int) -> Server:
    limits = ("--max-total-tokens", str(capacity_tokens), "--max-running-requests", "2")
    return start_server(*DELTASTORE, "--kv-compress-tier", tier, *limits)


def scores_of(server: Server, seed: int) -> list[float]:
    """Of a prompt's last quarter behind the rest, which is a hit."""
    tokens = prompt(PROMPT_TOKENS, seed)
    cached_tokens = 3 * PROMPT_TOKENS // 4
    generate(server, tokens[:cached_tokens])
    return score(server, tokens, cached_tokens)


def test_where_all_fits_it_is_lossless(start_server: StartServer) -> None:
    found = []
    for tier in ("lossless", "adaptive"):
        server = serve(start_server, tier, 4096)
        found.append([scores_of(server, seed) for seed in range(3)])
        assert server.settled_stats().coarse_tokens == 0
        stop(server.process)
    assert found[0] == found[1]


def test_pages_sink_before_anything_is_evicted(start_server: StartServer) -> None:
    server = serve(start_server, "adaptive", CAPACITY_TOKENS)
    stats = server.settled_stats()
    assert (stats.tier, stats.format, stats.capacity_tokens) == ("adaptive", "K4V3 to K3V2", CAPACITY_TOKENS)
    fresh = [scores_of(server, seed) for seed in range(PROMPTS)]
    stats = server.settled_stats()
    assert stats.evicted_tokens == 0
    assert 0 < stats.demoted_tokens <= stats.coarse_tokens < stats.stored_tokens
    assert (stats.accounting_errors, stats.observation_errors) == ((), 0)
    assert stats.used_bytes <= stats.resident_bytes

    # The first has given up bits since, is found all the same, and says nearly what it said.
    hit_tokens, hit_coarse_tokens = stats.hit_tokens, stats.hit_coarse_tokens
    again = scores_of(server, seed=0)
    stats = server.settled_stats()
    assert stats.evicted_tokens == 0
    assert stats.hit_tokens > hit_tokens
    assert stats.hit_coarse_tokens > hit_coarse_tokens
    off = [abs(one - other) for one, other in zip(fresh[0], again, strict=True)]
    assert 0 < sum(off) / len(off) < budgets.SUNK_NATS

    flush(server)
    stats = server.settled_stats()
    assert (stats.coarse_tokens, stats.pages_free, stats.accounting_errors) == (0, stats.pages_total, ())
    stop(server.process)
