"""What a prompt is answered does not depend on what else is cached, however short it is and however it begins."""

from __future__ import annotations

import pytest

from sglang_deltastore.host.server_process import Server
from tests.e2e.client import flush, generate, prompt
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

PROMPT_TOKENS, ANSWER_TOKENS, OTHERS, RUNNING, CAPACITY_TOKENS = 48, 8, 24, 4, 1024
SINKS = RUNNING + CAPACITY_TOKENS // 16 // 32


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """Of few sinks, whose pool is smaller than the traffic; a prompt's second chunk reads its first one packed."""
    return start_server(
        *DELTASTORE, "--kv-compress-tier", "conservative", "--max-total-tokens", str(CAPACITY_TOKENS),
        "--max-running-requests", str(RUNNING), "--chunked-prefill-size", "32",
    )  # fmt: skip


def answer(server: Server, input_ids: list[int], tokens: int = ANSWER_TOKENS) -> tuple[list[float], int]:
    """Log-probabilities of the answer's tokens, and how many of the prompt were cached."""
    told = generate(server, input_ids, tokens, return_logprob=True)["meta_info"]
    return [logprob for logprob, *_ in told["output_token_logprobs"]], told["cached_tokens"]


def others(first_token: int | None = None) -> list[list[int]]:
    """Of many lengths, as first tokens are rounded by the shape of the step that brings them."""
    prompts = [prompt(5 + 13 * seed % PROMPT_TOKENS, seed) for seed in range(100, 100 + OTHERS)]
    for number, each in enumerate(prompts):
        each[0] = 5000 + number if first_token is None else first_token
    return prompts


def test_a_short_prompt_behind_others(server: Server) -> None:
    """Cold, cached, and shorter than a tile, so that its answer completes its first one: as on an idle server. The
    others begin each with another token, then all as this one does."""
    ours, tiny = prompt(PROMPT_TOKENS, seed=1), prompt(5, seed=2)
    flush(server)
    cold, hit, of_tiny = answer(server, ours), answer(server, ours), answer(server, tiny, 24)
    assert (cold[1], hit[1]) == (0, 32)
    for first_token in (None, ours[0]):
        flush(server)
        for other in others(first_token):
            answer(server, other)
        assert [answer(server, ours), answer(server, ours), answer(server, tiny, 24)] == [cold, hit, of_tiny]


def test_what_is_cached_stays_as_it_is_while_others_come(server: Server) -> None:
    """Sequences live longer than the sinks around them, and come back whole or not at all."""
    flush(server)
    before = server.settled_stats()
    kept = prompt(PROMPT_TOKENS, seed=1)
    cold, hit = answer(server, kept), answer(server, kept)
    for round_ in range(2):
        for number, other in enumerate(others()):
            answer(server, other)
            if number % 2:
                assert answer(server, kept) == hit, (round_, number)
    for _ in range(3):
        for other in others():
            answer(server, other)
        assert answer(server, kept) in (cold, hit)
    stats = server.settled_stats()
    assert stats.evictions > before.evictions
    assert stats.sink_evictions > before.sink_evictions + OTHERS
    assert (stats.sinks_total, stats.census_current, stats.accounting_errors) == (SINKS, True, ())
    assert stats.sinks_bytes == (SINKS + 1) * stats.fp16_bytes_per_token


def test_a_shared_beginning_has_one_sink(server: Server) -> None:
    flush(server)
    for other in others(first_token=4000):
        answer(server, other)
    stats = server.settled_stats()
    assert stats.sinks_total - stats.sinks_free == 1
    flush(server)
    assert server.settled_stats().sinks_free == SINKS
