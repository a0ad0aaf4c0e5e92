"""One real server, every path of a request: cold, chunked, cached, branched, malformed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_deltastore.host.server_process import Server
from tests import budgets
from tests.e2e.client import flush, generate, post, prompt, score
from tests.e2e.conftest import StartServer

pytestmark = pytest.mark.slow

PAGE_TOKENS = 16
CAPACITY_TOKENS = 8192
CHUNK_TOKENS = 256


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Flags through SGLang's YAML configuration, as a deployment would write them."""
    config: Path = tmp_path_factory.mktemp("config") / "server.yaml"
    config.write_text(
        "kv-compress: deltastore\n"
        "kv-compress-tier: lossless\n"
        f"max-total-tokens: {CAPACITY_TOKENS}\n"
        f"chunked-prefill-size: {CHUNK_TOKENS}\n"
        "max-running-requests: 8\n"
        "enable-mixed-chunk: true\n"
    )
    return start_server("--config", str(config))


@pytest.fixture(autouse=True)
def accounting_holds(server: Server) -> Iterator[None]:
    """After every test the server is idle, healthy, and every page has one owner."""
    yield
    assert server.is_healthy()
    stats = server.settled_stats()
    assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
    assert stats.observation_errors == 0
    assert stats.pages_running == stats.frames_running == 0
    assert stats.pages_free + stats.pages_in_nodes == stats.pages_total == CAPACITY_TOKENS // PAGE_TOKENS


def test_the_store_is_as_small_as_its_tier_promises(server: Server) -> None:
    stats = server.store_stats()
    # 30 layers, 3 heads of 64: a 16-token page of K4V3 has 2,752 bytes, of float16 12,288
    assert (stats.tier, stats.format, stats.bytes_per_token) == ("lossless", "K4V3", 30 * 2752 / 16)
    assert stats.fp16_bytes_per_token == 23040
    assert stats.pages_bytes == (CAPACITY_TOKENS // PAGE_TOKENS + 1) * 30 * 2752
    assert stats.frames_bytes == 9 * 30 * 16 * 3 * 64 * 2 * 2


def test_a_hit_agrees_with_the_miss_and_hits_are_bit_identical(server: Server) -> None:
    tokens, half = prompt(700, seed=1), 352
    flush(server)
    cold = score(server, tokens, from_token=half)
    flush(server)
    generate(server, tokens[:half])
    first, second = (score(server, tokens, from_token=half) for _ in range(2))
    assert first == second
    difference = sum(abs(a - b) for a, b in zip(cold, first, strict=True)) / len(cold)
    # The miss sees its own chunk raw, the hit sees it packed.
    assert 0 < difference < budgets.ATTENTION_HIT_VERSUS_MISS_NATS


def test_greedy_answers_from_the_same_pages_are_the_same(server: Server) -> None:
    tokens = prompt(331, seed=2)
    generate(server, tokens)
    answers = [generate(server, tokens, tokens=24) for _ in range(2)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [320, 320]


@pytest.mark.parametrize(("shared", "hit"), [(15, 0), (16, 16), (17, 16), (40, 32), (300, 288)])
def test_a_branch_hits_up_to_where_it_parts(server: Server, shared: int, hit: int) -> None:
    flush(server)
    trunk = prompt(320, seed=3)
    generate(server, trunk)
    branch = trunk[:shared] + [token + 1 for token in trunk[shared:]]
    assert generate(server, branch)["meta_info"]["cached_tokens"] == hit


def test_the_next_turn_hits_all_whole_pages_of_prompt_and_answer(server: Server) -> None:
    flush(server)
    turn_one = prompt(100, seed=4)
    answer = generate(server, turn_one, tokens=40)["output_ids"]
    turn_two = [*turn_one, *answer, *prompt(20, seed=5)]
    stored = len(turn_one) + len(answer) - 1  # the last token is sampled and never run
    assert generate(server, turn_two)["meta_info"]["cached_tokens"] == stored // PAGE_TOKENS * PAGE_TOKENS


def test_requests_together_answer_as_they_do_alone(server: Server) -> None:
    """Mixed lengths in one batch: prefill chunks and decode rows side by side, each its own pages."""
    prompts = [prompt(length, seed=length) for length in (3, 16, 97, 300, 555)]
    flush(server)
    alone = [score(server, tokens, from_token=1) for tokens in prompts]
    flush(server)
    together = post(
        server, input_ids=prompts, return_logprob=True, logprob_start_len=[0] * len(prompts),
        sampling_params={"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    )  # fmt: skip
    together.raise_for_status()
    for answer, scores in zip(together.json(), alone, strict=True):
        assert answer["meta_info"]["completion_tokens"] == 12
        seen = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        # Chunks end elsewhere in a batch, so that other tokens are read packed.
        difference = sum(abs(a - b) for a, b in zip(seen, scores, strict=True)) / len(scores)
        assert difference < budgets.ATTENTION_HIT_VERSUS_MISS_NATS


def test_flush_returns_every_page(server: Server) -> None:
    generate(server, prompt(64, seed=6))
    assert server.store_stats().pages_in_nodes > 0
    flush(server)
    stats = server.store_stats()
    assert (stats.pages_free, stats.frames_free) == (stats.pages_total, stats.frames_total)


@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": list(range(1, 9000)), "sampling_params": {"max_new_tokens": 1}},  # longer than the context
        {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": -5}},
        {"input_ids": [1, 2, 3], "sampling_params": {"temperature": -1}},
        {"input_ids": [1, 2, 3], "sampling_params": {"no_such_parameter": 1}},
        {"input_ids": "not ids"},
        {"sampling_params": {}},
        {"input_ids": [49152], "sampling_params": {"max_new_tokens": 1}},  # one past the vocabulary
        {"input_ids": [5, -1], "sampling_params": {"max_new_tokens": 1}},
    ],
)
def test_bad_requests_are_answered_and_harm_nobody(server: Server, body: dict[str, Any]) -> None:
    assert 400 <= post(server, **body).status_code < 500


def test_a_body_that_is_no_json(server: Server) -> None:
    answer = requests.post(
        server.url + "/generate", data=b"{", headers={"Content-Type": "application/json"}, timeout=60
    )
    assert 400 <= answer.status_code < 500
