"""A model of gpt-oss's shape: every second layer has a window, behind which SGLang frees pages. Tiny and random,
against Hugging Face's run of the same weights."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from sglang_deltastore.host.server_process import Server, ServerFailed, serve
from sglang_deltastore.observe.stats import StoreStats
from tests import budgets
from tests.e2e import random_models
from tests.e2e.client import flush, generate, score
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, NGRAM, UNCALIBRATED
from tests.e2e.judged import Judged, check_that_nothing_is_lost, prompt

pytestmark = pytest.mark.slow

WINDOW_TOKENS, PAGE_TOKENS, CHUNK_TOKENS, REQUESTS = 64, 16, 128, 4
CAPACITY_TOKENS, WINDOW_SHARE = 2048, 0.25
#: ten windows, and more than the layers with one have pages for
PROMPT_TOKENS, CACHED_TOKENS = 640, 400
#: SGLang frees what a running request leaves behind in steps of SGLANG_SWA_EVICTION_INTERVAL tokens
STEP_TOKENS = 128

LAYERS, FP16_BYTES_PER_LAYER = 4, 2 * 64 * 2 * 2
ARGUMENTS = (
    *BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED,
    *("--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", str(REQUESTS)),
    *("--chunked-prefill-size", str(CHUNK_TOKENS), "--enable-mixed-chunk"),
    *("--schedule-conservativeness", "0.05"),  # admit as if answers were short: some are retracted
    *("--moe-runner-backend", "triton"),  # SGLang's other kernels for its experts need a GPU
)  # fmt: skip


PROMPT = prompt(PROMPT_TOKENS)


def judged(server: Server, model: PreTrainedModel, tier: str) -> Judged:
    largest_nats = budgets.SERVED_RAW_LARGEST_NATS if tier == "raw" else None
    return Judged(server, model, budgets.SERVED_WINDOWS_NATS[tier], largest_nats)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    config = random_models.gpt_oss()
    assert config.sliding_window == WINDOW_TOKENS
    # A choice among experts may turn over by a rounding error, and what follows would remember it.
    config.num_experts_per_tok = config.num_local_experts
    model = random_models.made(config)
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return folder, model


@pytest.fixture(
    scope="module", params=[("raw", ()), ("raw", NGRAM), ("lossless", ())], ids=["raw", "drafts", "lossless"]
)
def served(
    request: pytest.FixtureRequest, made: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Judged]:
    (folder, model), (tier, more) = made, request.param
    arguments = (*ARGUMENTS, "--kv-compress-tier", tier, "--swa-full-tokens-ratio", str(WINDOW_SHARE), *more)
    log_path = tmp_path_factory.mktemp("server") / "log"
    environ = {**os.environ, "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
    with serve(folder, arguments, log_path=log_path, environ=environ) as server:
        yield judged(server, model, tier)


def test_cold_and_in_chunks(served: Judged) -> None:
    flush(served.server)
    served.check(score(served.server, PROMPT, from_token=1), PROMPT)


def test_a_hit_and_what_is_decoded_after_it(served: Judged) -> None:
    served.check_hit(PROMPT, CACHED_TOKENS, CACHED_TOKENS)


def test_a_prefix_whose_window_was_freed_is_computed_anew(served: Judged) -> None:
    """Of a prompt SGLang keeps a window where each chunk of it ended: a branch hits there, and nowhere else."""
    for common, hit in ((3 * CHUNK_TOKENS + PAGE_TOKENS, 3 * CHUNK_TOKENS), (3 * CHUNK_TOKENS - 2 * PAGE_TOKENS, 256)):
        flush(served.server)  # what a branch and its drafts need may cost the prompt its oldest windows
        generate(served.server, PROMPT)
        branch = [*PROMPT[:common], *prompt(5 * PAGE_TOKENS, common)]
        answer = served.answer(branch)
        assert answer["meta_info"]["cached_tokens"] == hit
        served.check_answer(branch, answer)


def test_prompts_in_chunks_beside_answers(served: Judged) -> None:
    """Four requests at once, of different lengths, each over the others' decode steps."""
    flush(served.server)
    prompts = [prompt(PROMPT_TOKENS - 137 * seed, seed) for seed in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as clients:
        for ids, answer in zip(prompts, clients.map(served.answer, prompts), strict=True):
            served.check_answer(ids, answer)


def test_a_long_request_holds_its_window(served: Judged) -> None:
    flush(served.server)
    begun, tokens = prompt(PAGE_TOKENS, 3), 480
    seen: list[StoreStats] = []
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(served.answer, begun, tokens)
        while not answer.done():
            seen.append(served.server.store_stats())
            time.sleep(0.1)
    served.check_answer(begun, answer.result())
    assert max(stats.pages_running for stats in seen) > tokens * 3 // 4 // PAGE_TOKENS
    most = (WINDOW_TOKENS + STEP_TOKENS) // PAGE_TOKENS + 2  # and a page that it leaves, and one that it enters
    assert max(stats.window_pages_running for stats in seen) <= most
    assert [error for stats in seen for error in stats.accounting_errors] == []


def test_layers_with_windows_have_fewer_pages(served: Judged) -> None:
    stats = served.server.store_stats()
    layers = LAYERS // 2 * (1 + WINDOW_SHARE)
    assert stats.fp16_bytes_per_token == layers * FP16_BYTES_PER_LAYER
    assert stats.capacity_tokens == CAPACITY_TOKENS
    assert stats.window_pages_total == CAPACITY_TOKENS * WINDOW_SHARE // PAGE_TOKENS
    page_bytes = stats.bytes_per_token * PAGE_TOKENS / layers
    pages = LAYERS // 2 * (stats.pages_total + 1 + stats.window_pages_total + 1)
    assert stats.pages_bytes == pages * page_bytes


def test_nothing_is_lost_under_pressure(served: Judged) -> None:
    prompts = [prompt(100 + 67 * number % 540, number // 3) for number in range(24)]
    lengths = [20 + 43 * number % 160 for number in range(24)]
    with ThreadPoolExecutor(REQUESTS) as clients:
        for ids, length, answer in zip(prompts, lengths, clients.map(served.answer, prompts, lengths), strict=True):
            assert answer["meta_info"]["completion_tokens"] == length
            served.check_answer(ids, answer)
    check_that_nothing_is_lost(served.server, encoded_tokens=2 * CAPACITY_TOKENS)


def test_host_memory_wants_one_pool(made: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed) as failure,
        serve(made[0], (*ARGUMENTS, "--enable-hierarchical-cache"), log_path=tmp_path / "log"),
    ):
        pass
    assert "add --disable-hybrid-swa-memory" in str(failure.value)


@pytest.mark.long
def test_one_pool_keeps_every_page(made: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    arguments = (*ARGUMENTS, "--kv-compress-tier", "raw", "--disable-hybrid-swa-memory")
    with serve(made[0], arguments, log_path=tmp_path / "log") as server:
        served = judged(server, made[1], "raw")
        served.check(score(server, PROMPT, from_token=1), PROMPT)
        branch = [*PROMPT[:CACHED_TOKENS], *prompt(5 * PAGE_TOKENS, 1)]
        answer = served.answer(branch)
        assert answer["meta_info"]["cached_tokens"] == CACHED_TOKENS
        served.check_answer(branch, answer)
        stats = server.settled_stats()
    assert (stats.window_pages_total, stats.accounting_errors) == (0, ())
    assert stats.bytes_per_token == LAYERS * FP16_BYTES_PER_LAYER
    assert stats.fp16_bytes_per_token == LAYERS // 2 * (1 + 0.8) * FP16_BYTES_PER_LAYER


@pytest.mark.long
def test_it_calibrates_itself(made: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made[0], folder)
    random_models.save_tokenizer(folder)
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = (*ARGUMENTS, "--kv-compress-tier", "lossless", "--kv-compress-calibration", "auto")
    with serve(folder, arguments, log_path=tmp_path / "log", environ=environ) as server:
        assert server.store_stats().calibrated
        judged(server, made[1], "lossless").check(score(server, PROMPT, from_token=1), PROMPT)
