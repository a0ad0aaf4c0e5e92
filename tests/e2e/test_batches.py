"""The same prompt alone and beside others, from the same cached pages: how far its answer's log-probabilities move."""

from __future__ import annotations

import random

import pytest

from sglang_deltastore.host.server_process import Server
from tests import budgets
from tests.e2e.client import flush, generate, post
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

CACHED_TOKENS, PROMPT_TOKENS, ANSWER_TOKENS = 160, 300, 24
PROMPTS = [[random.Random(seed).randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)] for seed in range(5)]
#: random tokens leave greedy answers near ties: one that turns over ends the comparison, not the test
LEAST_COMPARED = 40

Answer = list[tuple[int, float]]


def answers(server: Server, prompts: list[list[int]]) -> list[Answer]:
    """Each prompt's greedy tokens with their log-probabilities, sent as one batch behind the prompts' cached pages."""
    flush(server)
    for prompt in PROMPTS:
        generate(server, prompt[:CACHED_TOKENS])
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    response = post(server, input_ids=prompts, sampling_params=sampling, return_logprob=True)
    response.raise_for_status()
    found = response.json()
    assert [answer["meta_info"]["cached_tokens"] for answer in found] == [CACHED_TOKENS] * len(prompts)
    return [[(entry[1], entry[0]) for entry in answer["meta_info"]["output_token_logprobs"]] for answer in found]


def differences(one: Answer, other: Answer) -> list[float]:
    """Of the tokens up to the first that differs."""
    found = []
    for (token, logprob), (other_token, other_logprob) in zip(one, other, strict=True):
        if token != other_token:
            break
        found.append(abs(logprob - other_logprob))
    return found


@pytest.mark.parametrize("tier", ["raw", "lossless"])
def test_a_batch_moves_an_answer_by_no_more_than_rounding(start_server: StartServer, tier: str) -> None:
    server = start_server(
        *DELTASTORE, "--kv-compress-tier", tier, "--max-total-tokens", "8192", "--max-running-requests", "8"
    )
    alone = [answers(server, [prompt])[0] for prompt in PROMPTS]
    together = answers(server, PROMPTS)
    assert answers(server, PROMPTS[:1])[0] == alone[0]
    assert answers(server, PROMPTS) == together
    moved = [value for pair in zip(alone, together, strict=True) for value in differences(*pair)]
    assert len(moved) >= LEAST_COMPARED
    assert sum(moved) / len(moved) < budgets.SERVED_BATCH_NATS[tier]
    server.process.terminate()
    server.process.wait(60)
