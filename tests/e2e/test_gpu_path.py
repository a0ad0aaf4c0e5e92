"""The path that a GPU server takes, on a CPU: Triton's kernels in its interpreter under a whole SGLang server."""

from __future__ import annotations

import os

import pytest

from tests import budgets
from tests.e2e.client import generate, prompt, score
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

PROMPT_TOKENS, SCORED_FROM, ANSWER_TOKENS = 70, 40, 3


def test_a_server_on_triton_s_kernels(start_server: StartServer) -> None:
    """Extends with and without a cached prefix, encoding, decode steps across a tile's end, two requests that share
    pages: the same log-probabilities as the compiled CPU kernels give."""
    ids = prompt(PROMPT_TOKENS, seed=1)
    found = {}
    for name, kernels, environ in (("cpu", "cpu", {}), ("triton", "triton", {"TRITON_INTERPRET": "1"})):
        server = start_server(
            *DELTASTORE, "--kv-compress-kernels", kernels, "--max-total-tokens", "512", environ=os.environ | environ
        )
        cold = score(server, ids, from_token=SCORED_FROM)
        answer = generate(server, ids[:46], ANSWER_TOKENS, return_logprob=True)
        assert answer["meta_info"]["cached_tokens"] == 32
        decoded = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        found[name] = [*cold, *decoded]
        stats = server.settled_stats()
        assert (stats.census_current, stats.accounting_errors) == (True, ())
        server.process.terminate()
        server.process.wait(60)
    differences = [abs(a - b) for a, b in zip(found["cpu"], found["triton"], strict=True)]
    assert sum(differences) / len(differences) < budgets.SERVED_KERNELS_NATS
