"""Drafts of n-grams on a real server: the texts and the pages of plain decoding. Under pressure: test_pressure.py; over
windows: test_windows.py."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from benchmarks.serving.speculation import PLAIN, REPETITIVE, prompts
from sglang_deltastore.host.server_process import Server, stop
from tests import budgets
from tests.e2e.client import flush, generate, post, prompt
from tests.e2e.conftest import DELTASTORE, NGRAM, StartServer
from tests.e2e.test_batches import differences

pytestmark = pytest.mark.slow

ANSWER_TOKENS, PAGE_TOKENS = 64, 16
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


def test_grammars_and_stop_strings_end_inside_drafts(servers: tuple[Server, Server]) -> None:
    ngram, _ = servers
    item = {"type": "object", "properties": {"name": {"enum": ["bolt", "nut"]}}, "required": ["name"]}
    schema = {"type": "array", "items": item, "minItems": 6, "maxItems": 6}
    sampling = {"temperature": 0, "max_new_tokens": 150, "json_schema": json.dumps(schema)}
    answer = post(ngram, text="Six bolts as JSON: ", sampling_params=sampling).json()
    assert [set(found) for found in json.loads(answer["text"])] == [{"name"}] * 6
    assert answer["meta_info"]["spec_accept_length"] > 1
    sampling = {"temperature": 0, "max_new_tokens": 40, "stop": ["4 5"]}
    answer = post(ngram, text="1 2 3 4 5 1 2 3 4 5 1 2 3 4 5 1 2", sampling_params=sampling).json()
    assert answer["meta_info"]["finish_reason"]["matched"] == "4 5"
    stats = ngram.settled_stats()
    assert (stats.accounting_errors, stats.observation_errors) == ((), 0)
