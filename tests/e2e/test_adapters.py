"""Several adapters (LoRA) on one server, each held against transformers with the adapter in its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sglang_deltastore.host.server_process import Server, serve
from tests import budgets
from tests.e2e import random_models
from tests.e2e.client import flush, post
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED
from tests.e2e.judged import Judged, prompt
from tests.e2e.test_canary_server import compared

pytestmark = pytest.mark.slow

PROMPT, PAGE_TOKENS, ANSWER_TOKENS, RANK = prompt(200), 16, 12, 4
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
BASE, ONE, TWO = None, "one", "two"


def save_adapter(folder: Path, model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A random adapter of all attention layers as peft saves one. Returns the model with it in its weights."""
    generator = torch.Generator().manual_seed(seed)
    adapted, parts = copy.deepcopy(model), {}
    for name, module in adapted.named_modules():
        if name.endswith(ADAPTED):
            down = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            parts |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += up @ down
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(ADAPTED), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapted


Adapted = tuple[Server, dict[str | None, PreTrainedModel], Path]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    """A server of a model and two adapters of it, the model by adapter, and the folder of them all."""
    folder = tmp_path_factory.mktemp("adapters")
    base = random_models.made(random_models.llama(64))
    base.save_pretrained(folder / "model")
    models = {BASE: base, ONE: save_adapter(folder / ONE, base, 1), TWO: save_adapter(folder / TWO, base, 2)}
    arguments = (
        *BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED, "--kv-compress-tier", "raw",
        "--max-total-tokens", "4096", "--kv-compress-canary", "1",
        "--lora-paths", *(f"{name}={folder / name}" for name in (ONE, TWO)), "--max-loras-per-batch", "3",
    )  # fmt: skip
    with serve(folder / "model", arguments, log_path=folder / "log") as server:
        yield server, models, folder


def judged(server: Server, model: PreTrainedModel) -> Judged:
    return Judged(server, model, budgets.SERVED_RAW_MEAN_NATS, budgets.SERVED_RAW_LARGEST_NATS)


def test_no_hit_crosses_from_one_adapter_to_another(adapted: Adapted) -> None:
    server, models, _ = adapted
    flush(server)
    whole_pages = (len(PROMPT) - 1) // PAGE_TOKENS * PAGE_TOKENS
    for hit_tokens in (0, whole_pages):
        for name, model in models.items():
            judge = judged(server, model)
            answer = judge.answer(PROMPT, ANSWER_TOKENS, lora_path=name)
            assert answer["meta_info"]["cached_tokens"] == hit_tokens
            judge.check_answer(PROMPT, answer)


def test_adapters_share_a_batch(adapted: Adapted) -> None:
    server, models, _ = adapted
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    names = [*models, *models]
    prompts = [prompt(40 + 7 * i, seed=i) for i in range(len(names))]
    answers = post(server, input_ids=prompts, lora_path=names, sampling_params=sampling, return_logprob=True).json()
    for name, ids, answer in zip(names, prompts, answers, strict=True):
        judged(server, models[name]).check_answer(ids, answer)


def test_the_canary_runs_a_request_again_with_its_adapter(adapted: Adapted) -> None:
    server, models, _ = adapted
    flush(server)
    before = server.settled_stats()
    for name, model in models.items():
        judged(server, model).answer(PROMPT, ANSWER_TOKENS, lora_path=name)
    stats = compared(server, before.canary_sequences + len(models))
    assert stats.canary_not_comparable == 0
    assert stats.canary_kl_worst < budgets.CANARY_RAW_NATS


def test_an_adapter_that_comes_again_finds_nothing_of_its_former_self(adapted: Adapted) -> None:
    server, models, folder = adapted
    judged(server, models[TWO]).answer(PROMPT, lora_path=TWO)
    for path, body in (
        ("unload_lora_adapter", {"lora_name": TWO}),
        ("load_lora_adapter", {"lora_name": TWO, "lora_path": str(folder / ONE)}),
    ):
        requests.post(f"{server.url}/{path}", json=body, timeout=60).raise_for_status()
    judge = judged(server, models[ONE])
    answer = judge.answer(PROMPT, lora_path=TWO)
    assert answer["meta_info"]["cached_tokens"] == 0
    judge.check_answer(PROMPT, answer)
    stats = server.settled_stats()
    assert (stats.accounting_errors, stats.observation_errors) == ((), 0)
