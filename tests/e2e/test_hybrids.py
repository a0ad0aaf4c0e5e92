"""Hybrids of state layers and full attention, tiny and random, against Hugging Face's run of the same weights.

On a CPU SGLang serves them only as hybrids_on_cpu.py lets it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from sglang_deltastore.host.server_process import Server, ServerFailed, serve
from sglang_deltastore.policy.calibration import load
from tests import budgets
from tests.e2e import hybrids_on_cpu, random_models
from tests.e2e.client import flush, generate, score
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED, or_long
from tests.e2e.judged import Judged, check_that_nothing_is_lost, prompt

pytestmark = pytest.mark.slow

FAMILIES = {
    "qwen3_next": random_models.qwen3_next,
    "qwen3_5": random_models.qwen3_5,
    "falcon_h1": random_models.falcon_h1,
    "nemotron_h": random_models.nemotron_h,
    "granite_hybrid": random_models.granite_hybrid,
}
#: family -> layers with a KV cache, of one KV head each, and its head_dim
ATTENTION = {
    "qwen3_next": (2, 256), "qwen3_5": (2, 256), "falcon_h1": (4, 64), "nemotron_h": (2, 64), "granite_hybrid": (2, 64)
}  # fmt: skip
#: of each kind of state, and of both tiers
SERVED = [("qwen3_5", "lossless"), ("nemotron_h", "raw")]
#: with them the others, in a quarter of an hour
ALL_SERVED = [*((name, "raw") for name in FAMILIES), ("qwen3_next", "lossless"), ("qwen3_5", "lossless")]
#: K4V3 of two heads of 256, each in pages of 16 tokens: 2,048 + 1,536 bytes of codes, 18 of scales, 14 of padding
LOSSLESS_BYTES_PER_TOKEN = 2 * (2048 + 1536 + 18 + 14) / 16

PAGE_TOKENS, CAPACITY_TOKENS, REQUESTS = 16, 1024, 4
#: prompts of three chunks of a prefill; a hit ends where SGLang has kept states, at a multiple of 64 tokens
PROMPT_TOKENS, CHUNK_TOKENS, CACHED_TOKENS, HIT_TOKENS = 300, 128, 200, 192
ARGUMENTS = (
    *BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED,
    *("--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", str(REQUESTS)),
    *("--chunked-prefill-size", str(CHUNK_TOKENS), "--enable-mixed-chunk"),
    *("--max-mamba-cache-size", "40", "--mamba-track-interval", "64"),
    *("--moe-runner-backend", "triton"),  # the kernels for experts that SGLang has for a CPU without AMX
)  # fmt: skip


PROMPT = prompt(PROMPT_TOKENS)


@dataclass(frozen=True)
class Served:
    family: str
    tier: str
    judged: Judged

    @property
    def server(self) -> Server:
        return self.judged.server


def judged(server: Server, model: PreTrainedModel, tier: str) -> Judged:
    largest_nats = budgets.SERVED_RAW_NATS if tier == "raw" else None
    return Judged(server, model, budgets.SERVED_HYBRID_NATS[tier], largest_nats)


def made(family: str, folder: Path) -> PreTrainedModel:
    """Such a model, as a folder that SGLang serves."""
    model = random_models.made(FAMILIES[family]())
    random_models.save_made(model, folder)
    model.set_attn_implementation("eager")
    return model


def serving(folder: Path, *arguments: str, **environ: str) -> AbstractContextManager[Server]:
    """A server that SGLang lets serve a hybrid, with its log in the folder."""
    path = os.pathsep.join([str(hybrids_on_cpu.install(folder / "plugin")), os.environ.get("PYTHONPATH", "")])
    # States of convolutions are bfloat16 else, whatever the model is.
    environ = {**os.environ, "PYTHONPATH": path, "SGLANG_MAMBA_CONV_DTYPE": "float32", **environ}
    return serve(folder, (*ARGUMENTS, *arguments), log_path=folder / "log", environ=environ)


@pytest.fixture(scope="module", params=or_long(ALL_SERVED, SERVED), ids="-".join)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family, tier = request.param
    folder = tmp_path_factory.mktemp(family)
    model = made(family, folder)
    with serving(folder, "--kv-compress-tier", tier) as server:
        yield Served(family, tier, judged(server, model, tier))


def test_cold_and_in_chunks(served: Served) -> None:
    flush(served.server)
    served.judged.check(score(served.server, PROMPT, from_token=1), PROMPT)


def test_a_hit_and_what_is_decoded_after_it(served: Served) -> None:
    served.judged.check_hit(PROMPT, CACHED_TOKENS, HIT_TOKENS)


def test_prompts_in_chunks_beside_answers(served: Served) -> None:
    """Four requests at once, of different lengths, each over the others' decode steps."""
    flush(served.server)
    prompts = [prompt(PROMPT_TOKENS - 37 * seed, seed) for seed in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as clients:
        for ids, answer in zip(prompts, clients.map(served.judged.answer, prompts), strict=True):
            served.judged.check_answer(ids, answer)


def test_pages_are_of_the_attention_layers_alone(served: Served) -> None:
    layers, head_dim = ATTENTION[served.family]
    stats, fp16 = served.server.store_stats(), layers * 2 * head_dim * 2
    assert stats.fp16_bytes_per_token == fp16
    assert stats.bytes_per_token == (fp16 if served.tier == "raw" else LOSSLESS_BYTES_PER_TOKEN)
    assert stats.capacity_tokens == CAPACITY_TOKENS


def test_nothing_is_lost_under_pressure(served: Served) -> None:
    requests = 24

    def answer(number: int) -> int:
        ids = prompt(100 + 17 * number % 150, number // 3)
        return generate(served.server, ids, 20 + 13 * number % 60)["meta_info"]["completion_tokens"]

    with ThreadPoolExecutor(REQUESTS) as clients:
        assert list(clients.map(answer, range(requests))) == [20 + 13 * number % 60 for number in range(requests)]
    check_that_nothing_is_lost(served.server, encoded_tokens=2 * CAPACITY_TOKENS)


@pytest.mark.parametrize("family", or_long(["qwen3_5", "nemotron_h"], ["qwen3_5"]))
def test_a_hybrid_calibrates_itself(family: str, tmp_path: Path) -> None:
    """For its attention layers, with its other layers' states as they are in a prompt of their own."""
    model = made(family, tmp_path)
    random_models.save_tokenizer(tmp_path)
    arguments = ("--kv-compress-tier", "lossless", "--kv-compress-calibration", "auto")
    with serving(tmp_path, *arguments, XDG_CACHE_HOME=str(tmp_path / "cache")) as server:
        assert server.store_stats().calibrated
        (path,) = (tmp_path / "cache").rglob("*.safetensors")
        assert len(load(path).layers) == ATTENTION[family][0]
        judged(server, model, "lossless").check(score(server, PROMPT, from_token=1), PROMPT)


def test_without_states_for_prefixes_a_hybrid_is_refused(tmp_path: Path) -> None:
    made("qwen3_next", tmp_path)
    with pytest.raises(ServerFailed) as failure, serve(tmp_path, ARGUMENTS, log_path=tmp_path / "log"):
        pass
    assert "a hybrid's platform is one where SGLang keeps no states for whole pages; allowed is a GPU" in str(
        failure.value
    )
