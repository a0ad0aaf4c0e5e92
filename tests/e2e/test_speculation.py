"""Drafts of n-grams on a real server: the same texts as without them, and nothing of what was not accepted is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from benchmarks.serving.speculation import PLAIN, REPETITIVE, prompts
from sglang_deltastore.host.server_process import Server, stop
from tests import budgets
from tests.e2e.client import ANSWER_TIMEOUT_S, flush, generate, post, prompt
from tests.e2e.conftest import DELTASTORE, StartServer
from tests.e2e.test_batches import differences
from tests.e2e.test_pressure import HOST_MEMORY

pytestmark = pytest.mark.slow

DRAFTS, ANSWER_TOKENS, PAGE_TOKENS = 6, 64, 16
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(DRAFTS))
TEXTS = prompts()[REPETITIVE][::6] + prompts()[PLAIN][:1]

Scored = list[tuple[int, float]]


@pytest.fixture(scope="module", params=["raw", "conservative"])
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def servers(start_server: StartServer, tier: str) -> Iterator[tuple[Server, Server]]:
    """With drafts, and without."""
    common = (*DELTASTORE, "--kv-compress-tier", tier, "--max-total-tokens", "8192", "--max-running-requests", "4")
    both = start_server(*common, *NGRAM), start_server(*common)
    yield both
    for server in both:  # the next tier's need their memory
        stop(server.process)


def scored(server: Server, text: str) -> tuple[Scored, dict]:
    """A greedy answer's tokens with their log-probabilities, and what the server says of it."""
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    response = post(server, text=text, sampling_params=sampling, return_logprob=True)
    response.raise_for_status()
    meta = response.json()["meta_info"]
    return [(entry[1], entry[0]) for entry in meta["output_token_logprobs"]], meta


def test_texts_are_those_of_plain_decoding(servers: tuple[Server, Server], tier: str) -> None:
    """But for near ties, which another batch's rounding turns over: they end the comparison of that text."""
    moved, same = [], 0
    for text in TEXTS:
        (ngram, meta), (plain, _) = (scored(server, text) for server in servers)
        moved += differences(ngram, plain)
        same += [token for token, _ in ngram] == [token for token, _ in plain]
        assert meta["spec_verify_ct"] < ANSWER_TOKENS
    if tier == "raw":
        assert same == len(TEXTS)
    assert sum(moved) / len(moved) < budgets.SPECULATION_NATS[tier]


def test_a_hit_behind_accepted_drafts_reads_the_pages_of_plain_decoding(
    servers: tuple[Server, Server], tier: str
) -> None:
    found = []
    for server in servers:
        flush(server)
        ids = prompt(40, seed=5) * 2
        first = generate(server, ids, 45)
        whole = [*ids, *first["output_ids"], *prompt(8, seed=6)]
        again = generate(server, whole, 4, return_logprob=True)
        assert again["meta_info"]["cached_tokens"] == (80 + 45 - 1) // PAGE_TOKENS * PAGE_TOKENS
        found.append((first["output_ids"], again["meta_info"]))
    (ngram_ids, ngram), (plain_ids, plain) = found
    if ngram_ids == plain_ids:
        pairs = [[(entry[1], entry[0]) for entry in meta["output_token_logprobs"]] for meta in (ngram, plain)]
        moved = differences(*pairs)
        assert sum(moved) / len(moved) < budgets.SPECULATION_NATS[tier]
    else:
        assert tier != "raw"


@pytest.fixture(scope="module", params=[(), HOST_MEMORY], ids=["device", "device and host"])
def small(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    """A pool far too small, which admits as if answers were short, and prompts in chunks."""
    return start_server(
        *(*DELTASTORE, *NGRAM, *request.param, "--kv-compress-tier", "conservative", "--max-total-tokens", "1024"),
        *("--max-running-requests", "8", "--chunked-prefill-size", "128", "--schedule-conservativeness", "0.05"),
        environ={**os.environ, "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},
    )


def test_aborts_evictions_and_retractions_lose_nothing(small: Server) -> None:
    def answer(number: int) -> None:
        """Every fourth client hangs up; prompts of 66 to 265 tokens share their first 64 in groups of five."""
        hangs_up, wanted = number % 4 == 0, 60 + 7 * number % 60
        ids = prompt(64, seed=number // 5) + prompt(2 + 67 * number % 200, seed=100 + number)
        sampling = {"temperature": 0, "max_new_tokens": wanted, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        received = 0
        with requests.post(small.url + "/generate", json=body, stream=True, timeout=ANSWER_TIMEOUT_S) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    received = json.loads(line[6:])["meta_info"]["completion_tokens"]
                    if hangs_up and received >= 3:
                        return
        assert received == wanted

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(answer, range(32)))
    stats = small.settled_stats()
    assert stats.census_current
    assert stats.accounting_errors == ()
    assert stats.observation_errors == 0
    assert stats.evictions > 0
    flush(small)
    stats = small.settled_stats()
    assert stats.pages_free == stats.pages_total
    assert stats.frames_free == stats.frames_total
