"""Hybrids of gated delta net and full attention layers, tiny and random, against Hugging Face's of the same weights.

On a CPU SGLang serves them only as hybrids_on_cpu.py lets it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sglang_deltastore.host.server_process import Server, ServerFailed, serve
from sglang_deltastore.policy.calibration import load
from tests import budgets
from tests.e2e import hybrids_on_cpu, random_models
from tests.e2e.client import flush, generate, score
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED

pytestmark = pytest.mark.slow

FAMILIES = {"qwen3_next": random_models.qwen3_next, "qwen3_5": random_models.qwen3_5}
ATTENTION_LAYERS, PAGE_TOKENS, CAPACITY_TOKENS, REQUESTS = 2, 16, 1024, 4
#: prompts of three chunks of a prefill; a hit ends where SGLang has kept states, at a multiple of 64 tokens
PROMPT_TOKENS, CHUNK_TOKENS, CACHED_TOKENS, HIT_TOKENS, ANSWER_TOKENS = 300, 128, 200, 192, 40
ARGUMENTS = (
    *BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED,
    *("--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", str(REQUESTS)),
    *("--chunked-prefill-size", str(CHUNK_TOKENS), "--enable-mixed-chunk"),
    *("--max-mamba-cache-size", "40", "--mamba-track-interval", "64"),
)  # fmt: skip

LogProbs = Callable[[list[int]], torch.Tensor]


def prompt(seed: int) -> list[int]:
    return [(37 * i * i + (11 + seed) * i) % 4000 + 10 for i in range(PROMPT_TOKENS)]


@dataclass(frozen=True)
class Family:
    folder: Path
    log_probs: LogProbs
    """ids -> the log-probability of each but the first, given those before it, by Hugging Face."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    model = random_models.made(FAMILIES[request.param]())
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")

    @torch.inference_mode()
    def log_probs(ids: list[int]) -> torch.Tensor:
        of_all = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return of_all[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]

    return Family(folder, log_probs)


StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def start_server(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """start_server(*arguments, **environment variables) -> a server that ends with the module."""
    plugin = hybrids_on_cpu.install(tmp_path_factory.mktemp("plugin"))
    path = os.pathsep.join([str(plugin), os.environ.get("PYTHONPATH", "")])
    # States of convolutions are bfloat16 else, whatever the model is.
    environ = {**os.environ, "PYTHONPATH": path, "SGLANG_MAMBA_CONV_DTYPE": "float32"}
    with ExitStack() as stack:

        def start(*arguments: str, **more: str) -> Server:
            log_path = tmp_path_factory.mktemp("server") / "log"
            whole = (*ARGUMENTS, *arguments)
            return stack.enter_context(serve(family.folder, whole, log_path=log_path, environ=environ | more))

        yield start


@pytest.fixture(scope="module", params=["raw", "lossless"])
def served(start_server: StartServer, request: pytest.FixtureRequest) -> Iterator[tuple[str, Server]]:
    server = start_server("--kv-compress-tier", request.param)
    yield request.param, server
    server.process.terminate()
    server.process.wait(60)


def differences(ours: list[float], theirs: torch.Tensor) -> torch.Tensor:
    return (torch.tensor(ours) - theirs).abs()


def check(tier: str, ours: list[float], theirs: torch.Tensor) -> None:
    found = differences(ours, theirs)
    print("MEASURED", tier, f"{found.mean():.2e} {found.max():.2e}")
    assert found.mean() < budgets.SERVED_HYBRID_NATS[tier]
    if tier == "raw":
        assert found.max() < budgets.SERVED_RAW_NATS


def test_cold_and_in_chunks(family: Family, served: tuple[str, Server]) -> None:
    tier, server = served
    flush(server)
    check(tier, score(server, prompt(0), from_token=1), family.log_probs(prompt(0)))


def test_a_hit_and_what_is_decoded_after_it(family: Family, served: tuple[str, Server]) -> None:
    tier, server = served
    flush(server)
    generate(server, prompt(0)[:CACHED_TOKENS])
    answer = generate(
        server, prompt(0), ANSWER_TOKENS, return_logprob=True, logprob_start_len=CACHED_TOKENS, return_output_ids=True
    )
    assert answer["meta_info"]["cached_tokens"] == HIT_TOKENS
    scored = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    check(tier, scored, family.log_probs(prompt(0))[CACHED_TOKENS:])
    decoded = answer["meta_info"]["output_token_logprobs"]
    of_all = family.log_probs([*prompt(0), *(entry[1] for entry in decoded)])
    check(tier, [entry[0] for entry in decoded], of_all[PROMPT_TOKENS - 1 :])


def test_prompts_in_chunks_beside_answers(family: Family, served: tuple[str, Server]) -> None:
    """Four requests at once, of different lengths, each over the others' decode steps."""
    tier, server = served
    flush(server)
    prompts = [prompt(seed)[: PROMPT_TOKENS - 37 * seed] for seed in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as clients:
        answers = list(clients.map(lambda ids: generate(server, ids, ANSWER_TOKENS, return_logprob=True), prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        decoded = answer["meta_info"]["output_token_logprobs"]
        of_all = family.log_probs([*ids, *(entry[1] for entry in decoded)])
        check(tier, [entry[0] for entry in decoded], of_all[len(ids) - 1 :])


def test_pages_are_of_the_attention_layers_alone(served: tuple[str, Server]) -> None:
    tier, server = served
    stats = server.store_stats()
    fp16 = ATTENTION_LAYERS * 2 * 256 * 2
    assert stats.fp16_bytes_per_token == fp16
    assert stats.bytes_per_token == (fp16 if tier == "raw" else LOSSLESS_BYTES_PER_TOKEN)
    assert stats.capacity_tokens == CAPACITY_TOKENS


#: K4V3 of two layers with one head of 256: 4 + 3 bits a value; a scale's byte for each vector, and 16 tokens' padding
LOSSLESS_BYTES_PER_TOKEN = 458


def test_nothing_is_lost_under_pressure(served: tuple[str, Server]) -> None:
    _, server = served

    def answer(number: int) -> int:
        ids = prompt(number // 3)[: 100 + 17 * number % 150]
        return generate(server, ids, 20 + 13 * number % 60)["meta_info"]["completion_tokens"]

    with ThreadPoolExecutor(REQUESTS) as clients:
        assert list(clients.map(answer, range(24))) == [20 + 13 * number % 60 for number in range(24)]
    stats = server.settled_stats()
    assert stats.encoded_tokens > 2 * CAPACITY_TOKENS
    assert (stats.census_current, stats.accounting_errors, stats.untracked_tokens) == (True, (), 0)
    assert stats.observation_errors == 0
    flush(server)
    stats = server.settled_stats()
    assert stats.pages_free == stats.pages_total == CAPACITY_TOKENS // PAGE_TOKENS
    assert stats.frames_free == stats.frames_total == REQUESTS


def test_a_hybrid_calibrates_itself(family: Family, start_server: StartServer, tmp_path: Path) -> None:
    """For its attention layers, with its other layers' states as they are in a prompt of their own."""
    random_models.save_tokenizer(family.folder)
    arguments = ("--kv-compress-tier", "lossless", "--kv-compress-calibration", "auto")
    server = start_server(*arguments, XDG_CACHE_HOME=str(tmp_path))
    assert server.store_stats().calibrated
    (path,) = tmp_path.rglob("*.safetensors")
    assert len(load(path).layers) == ATTENTION_LAYERS
    check("lossless", score(server, prompt(0), from_token=1), family.log_probs(prompt(0)))
    server.process.terminate()
    server.process.wait(60)


def test_without_states_for_prefixes_a_hybrid_is_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ServerFailed) as failure, serve(family.folder, ARGUMENTS, log_path=tmp_path / "log"):
        pass
    assert "a kind of layer is layer_types with linear_attention; allowed is attention in every" in str(failure.value)
