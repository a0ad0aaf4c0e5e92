"""Drafts on a real server, of n-grams and of a model: the texts and the pages of plain decoding. Under pressure:
test_pressure.py; over windows: test_windows.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.serving.speculation import PLAIN, REPETITIVE, prompts
from sglang_deltastore.host.server_process import Server, stop
from tests import budgets
from tests.e2e import draft_heads
from tests.e2e.client import flush, generate, post, prompt
from tests.e2e.conftest import DELTASTORE, NGRAM, StartServer, draft_model, or_long
from tests.e2e.test_batches import differences

pytestmark = pytest.mark.slow

ANSWER_TOKENS, PAGE_TOKENS = 64, 16
TEXTS = prompts()[REPETITIVE][::6] + prompts()[PLAIN][:1]

NGRAMS, ITSELF, ECHO = DRAFTERS = "n-grams", "the model itself", "a head that says the last token again"
DRAFTS = 6
ACCEPTED = {NGRAMS: (1.5, DRAFTS), ITSELF: (0.75 * DRAFTS, DRAFTS), ECHO: (1.0, 1.5)}
"""Tokens of a step, of DRAFTS at most. SGLang's draft model reads a sequence without its first token, so that even the
model itself sometimes guesses another."""

Scored = list[tuple[int, float]]

CASES = [(tier, drafter) for tier in ("raw", "conservative") for drafter in DRAFTERS]
SHORT = [("raw", NGRAMS), ("raw", ECHO), ("conservative", ITSELF)]


@pytest.fixture(scope="module", params=or_long(CASES, SHORT), ids=" from ".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def tier(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture(scope="module")
def drafter(case: tuple[str, str]) -> str:
    """What the drafts come from."""
    return case[1]


@pytest.fixture(scope="module")
def plain(start_server: StartServer) -> Callable[[str], Server]:
    """A tier's server without drafts."""
    return cache(lambda tier: start_server(*common(tier)))


@pytest.fixture(scope="module")
def servers(
    start_server: StartServer,
    tier: str,
    plain: Callable[[str], Server],
    drafter: str,
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, Server]]:
    """With drafts, and without."""
    if drafter == NGRAMS:
        drafts: tuple[str, ...] = NGRAM
    elif drafter == ITSELF:
        drafts = draft_model(smollm2)
    else:
        drafts = draft_model(draft_heads.echo(smollm2, tmp_path_factory.mktemp("head")), "EAGLE")
    server = start_server(*common(tier), *drafts, "--speculative-num-draft-tokens", str(DRAFTS))
    yield server, plain(tier)
    stop(server.process)  # the next case's needs its memory


def common(tier: str) -> tuple[str, ...]:
    return (*DELTASTORE, "--kv-compress-tier", tier, "--max-total-tokens", "8192", "--max-running-requests", "4")


def scored(server: Server, text: str) -> tuple[Scored, dict]:
    """A greedy answer's tokens with their log-probabilities, and what the server says of it. It has not seen the text
    before: behind a hit, packed pages would be read where new tokens are."""
    flush(server)
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    response = post(server, text=text, sampling_params=sampling, return_logprob=True)
    response.raise_for_status()
    meta = response.json()["meta_info"]
    return [(entry[1], entry[0]) for entry in meta["output_token_logprobs"]], meta


def test_texts_are_those_of_plain_decoding(servers: tuple[Server, Server], tier: str, drafter: str) -> None:
    """But for near ties, which another batch's rounding turns over: they end the comparison of that text."""
    moved, same, accepted = [], 0, []
    for text in TEXTS:
        (drafted, meta), (decoded, _) = (scored(server, text) for server in servers)
        moved += differences(drafted, decoded)
        same += [token for token, _ in drafted] == [token for token, _ in decoded]
        accepted.append(meta["spec_accept_length"])
    least, most = ACCEPTED[drafter]
    assert least <= statistics.fmean(accepted) <= most
    if tier == "raw":
        assert same == len(TEXTS)
    assert sum(moved) / len(moved) < budgets.SPECULATION_NATS[tier]


@pytest.mark.parametrize("case", [("raw", ECHO)], ids=" from ".join, indirect=True, scope="module")
def test_where_the_model_says_one_token_again_and_again_the_head_is_right(servers: tuple[Server, Server]) -> None:
    """It has nothing but the model's hidden states to say it from."""
    answer, meta = scored(servers[0], "_" * 200)
    assert len({token for token, _ in answer[8:]}) == 1
    assert meta["spec_accept_length"] > 0.7 * DRAFTS


def test_a_hit_behind_accepted_drafts_reads_the_pages_of_plain_decoding(
    servers: tuple[Server, Server], tier: str
) -> None:
    """By the log-probabilities of what follows, the same for both: a few tokens of an answer say too little of pages in
    which rounding has turned over some codes."""
    found = []
    for server in servers:
        flush(server)
        ids = prompt(40, seed=5) * 2
        answer = generate(server, ids, 45)["output_ids"]
        whole = [*ids, *answer, *prompt(48, seed=7)]
        meta = generate(server, whole, return_logprob=True, logprob_start_len=len(ids) + len(answer) - 1)["meta_info"]
        assert meta["cached_tokens"] == (len(ids) + len(answer) - 1) // PAGE_TOKENS * PAGE_TOKENS
        found.append((answer, [entry[0] for entry in meta["input_token_logprobs"][1:]]))
    (drafted_ids, drafted), (decoded_ids, decoded) = found
    if drafted_ids == decoded_ids:
        moved = [abs(one - other) for one, other in zip(drafted, decoded, strict=True)]
        assert statistics.fmean(moved) < budgets.SPECULATION_NATS[tier]
    else:
        assert tier != "raw"


def test_grammars_and_stop_strings_end_inside_drafts(servers: tuple[Server, Server], drafter: str) -> None:
    drafting, _ = servers
    item = {"type": "object", "properties": {"name": {"enum": ["bolt", "nut"]}}, "required": ["name"]}
    schema = {"type": "array", "items": item, "minItems": 6, "maxItems": 6}
    sampling = {"temperature": 0, "max_new_tokens": 150, "json_schema": json.dumps(schema)}
    answer = post(drafting, text="Six bolts as JSON: ", sampling_params=sampling).json()
    assert [set(found) for found in json.loads(answer["text"])] == [{"name"}] * 6
    if drafter != ECHO:
        assert answer["meta_info"]["spec_accept_length"] > 1
    sampling = {"temperature": 0, "max_new_tokens": 40, "stop": ["4 5"]}
    answer = post(drafting, text="1 2 3 4 5 1 2 3 4 5 1 2 3 4 5 1 2", sampling_params=sampling).json()
    assert answer["meta_info"]["finish_reason"]["matched"] == "4 5"
    stats = drafting.settled_stats()
    assert (stats.accounting_errors, stats.observation_errors) == ((), 0)
