"""Real servers that run their own answers again with raw attention, and say what compression cost them."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.serving.canary_plugins import install
from sglang_deltastore.host.server_process import Server, ServerFailed, serve, stop
from sglang_deltastore.observe.stats import StoreStats
from tests import budgets
from tests.e2e import judged, random_models, test_hybrids, test_windows
from tests.e2e.client import flush, generate, post, prompt
from tests.e2e.conftest import DELTASTORE, StartServer, or_long

pytestmark = pytest.mark.slow

#: the longest sequence that is run again
CHUNK_TOKENS = 512
ARGUMENTS = (
    *DELTASTORE, "--max-total-tokens", "4096", "--chunked-prefill-size", str(CHUNK_TOKENS), "--enable-metrics",
    "--kv-compress-canary", "1", "--kv-compress-tier",
)  # fmt: skip
PROMPT_TOKENS, MORE_TOKENS, ANSWER_TOKENS, USERS = 320, 50, 24, 2
MOST_SECONDS = 300


def compared(server: Server, requests_: int) -> StoreStats:
    """The facts once so many requests have been run again, or will never be."""
    until = time.monotonic() + MOST_SECONDS
    while (stats := server.settled_stats()).canary_sequences + stats.canary_too_long < requests_:
        assert time.monotonic() < until, stats
        time.sleep(0.2)
    assert (stats.observation_errors, stats.accounting_errors, stats.canary_waiting) == (0, (), 0)
    return stats


def talk(server: Server, **body: Any) -> list[dict[str, Any]]:
    """Two turns of each user; the second finds the first's prompt, and the template of both."""
    answers = []
    for user in range(USERS):
        first = prompt(PROMPT_TOKENS, seed=1) + prompt(16, seed=10 + user)
        answers += [
            generate(server, ids, ANSWER_TOKENS, **body) for ids in (first, first + prompt(MORE_TOKENS, seed=3))
        ]
    return answers


@pytest.fixture(scope="module")
def measured(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoreStats]:
    """By tier, the facts after the same talk."""
    found = {}
    for tier in ("raw", "k4v2", "k2v2"):
        folder = tmp_path_factory.mktemp("plugins") / "p"
        server = start_server(*ARGUMENTS, tier, environ=install(folder, "uncapped"))
        talk(server)
        found[tier] = compared(server, 1 + 2 * USERS)  # SGLang's own first request as well
        if tier == "k4v2":
            check_series(server, found[tier])
        stop(server.process)
    return found


def check_series(server: Server, stats: StoreStats) -> None:
    """Prometheus has the same, and who asks for a second run of nothing waits for nothing."""
    lines = requests.get(server.url + "/metrics", timeout=60).text.splitlines()
    sums = {
        ending: [line for line in lines if line.startswith(f"deltastore:canary_kl_nats_{ending}{{")]
        for ending in ("count", "sum")
    }
    values = {ending: sum(float(line.split()[-1]) for line in found) for ending, found in sums.items()}
    assert values == {"count": stats.canary_tokens, "sum": pytest.approx(stats.canary_kl_nats)}
    assert {'hit="0%"', 'hit="100%"'} <= {part for line in sums["count"] for part in line.split("{")[1].split(",")}


def test_raw_pages_cost_nothing_and_coarser_ones_more(measured: dict[str, StoreStats]) -> None:
    raw, k4v2, coarse = (measured[name] for name in ("raw", "k4v2", "k2v2"))
    assert raw.canary_kl_mean < budgets.CANARY_RAW_NATS
    assert raw.canary_top1_agreement == 1
    assert k4v2.canary_kl_mean > 100 * budgets.CANARY_RAW_NATS
    assert coarse.canary_kl_mean > 5 * k4v2.canary_kl_mean


def test_the_smallest_tier_is_as_small_as_it_says(measured: dict[str, StoreStats]) -> None:
    stats = measured["k2v2"]
    assert (stats.tier, stats.format) == ("k2v2", "K2V2")
    assert stats.fp16_bytes_per_token / stats.bytes_per_token >= 7.5


def test_every_answer_is_compared_by_what_it_found(measured: dict[str, StoreStats]) -> None:
    for stats in measured.values():
        by_hit = {name: part.tokens for name, part in stats.canary_by_hit.items()}
        assert by_hit.pop("0%") - ANSWER_TOKENS in range(1, 33), "the first prompt, and SGLang's own request"
        assert sum(by_hit.values()) == (2 * USERS - 1) * ANSWER_TOKENS
        assert stats.canary_by_context["1K"].tokens == stats.canary_tokens
        assert stats.canary_kl_worst == max(part.kl_worst for part in stats.canary_by_hit.values())


def test_answers_are_those_of_a_server_without(start_server: StartServer, tmp_path: Path) -> None:
    """Also with log-probabilities; nothing is stored by the second runs, and what is not comparable is said."""
    watched = start_server(*ARGUMENTS, "k4v2", environ=install(tmp_path / "p", "uncapped"))
    without = start_server(*ARGUMENTS, "k4v2", "--kv-compress-canary", "0")
    asked = {"return_logprob": True, "top_logprobs_num": 3}
    for body in ({}, asked):
        ours, theirs = (
            [answer["meta_info"] | {"ids": answer["output_ids"]} for answer in talk(server, **body)]
            for server in (watched, without)
        )
        for mine, their in zip(ours, theirs, strict=True):
            assert mine.keys() == their.keys()
            assert {name: mine[name] for name in ("ids", "cached_tokens")} == {
                name: their[name] for name in ("ids", "cached_tokens")
            }
            assert ("output_token_logprobs" in mine) == bool(body)
            assert mine.get("output_top_logprobs") == their.get("output_top_logprobs")
        stats = compared(watched, stats_before(body))
        assert stats.nodes_total == without.settled_stats().nodes_total
        assert stats.pages_free == without.settled_stats().pages_free
        for server in (watched, without):
            flush(server)
    kl = stats.canary_kl_nats, stats.canary_tokens
    # What a request does to its own distribution comes after what is compared.
    bias = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, "logit_bias": {"7": 100}}
    answer = post(watched, input_ids=prompt(100, seed=5), sampling_params=bias).json()
    assert answer["output_ids"] == [7] * 8
    generate(watched, prompt(CHUNK_TOKENS - 8, seed=6), 16)
    stats = compared(watched, stats.canary_sequences + 2)
    assert stats.canary_too_long == 1 and stats.canary_tokens == kl[1] + 8
    assert (stats.canary_kl_nats - kl[0]) / 8 < 10 * stats.canary_kl_mean
    assert without.store_stats().canary_sequences == 0
    for server in (watched, without):
        stop(server.process)


def stats_before(body: dict[str, Any]) -> int:
    """Requests that have ended: SGLang's own, and one talk or two."""
    return 1 + 2 * USERS * (2 if body else 1)


def test_ranks_that_would_not_agree_are_refused(start_server: StartServer) -> None:
    with pytest.raises(ServerFailed, match="exit code 78") as failed:
        start_server(*ARGUMENTS, "k4v2", "--tensor-parallel-size", "3")
    assert "--kv-compress-canary 1 with --tensor-parallel-size 3: allowed is one rank" in str(failed.value)


@pytest.mark.parametrize("family", or_long(["gpt_oss", "qwen3_5"], ["gpt_oss"]))
def test_windows_sinks_experts_and_states_are_run_again_as_they_are(family: str, tmp_path: Path) -> None:
    """Of tiny random models, in raw pages: the second run is the first one's like."""
    plugins = install(tmp_path / "plugins", "uncapped")
    more = ("--chunked-prefill-size", str(CHUNK_TOKENS), "--kv-compress-canary", "1", "--kv-compress-tier", "raw")
    with ExitStack() as stack:
        if family == "gpt_oss":
            config = random_models.gpt_oss()
            config.num_experts_per_tok = config.num_local_experts
            random_models.made(config).save_pretrained(tmp_path)
            arguments = (*test_windows.ARGUMENTS, *more)
            server = stack.enter_context(serve(tmp_path, arguments, log_path=tmp_path / "log", environ=plugins))
        else:
            test_hybrids.made(family, tmp_path)
            both = os.pathsep.join([str(tmp_path / "plugin"), plugins["PYTHONPATH"]])
            server = stack.enter_context(test_hybrids.serving(tmp_path, *more, PYTHONPATH=both))
        ids = judged.prompt(300)
        generate(server, ids[:200], ANSWER_TOKENS)
        assert generate(server, ids, ANSWER_TOKENS)["meta_info"]["cached_tokens"]
        stats = compared(server, 3)
    assert stats.canary_tokens >= 2 * ANSWER_TOKENS
    assert stats.canary_kl_worst < budgets.CANARY_RAW_NATS
