"""Attention of other shapes than most models have, against transformers' eager attention on the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sglang_deltastore.host.server_process import Server, serve
from tests import budgets
from tests.e2e import random_models
from tests.e2e.client import flush, generate, score
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED

pytestmark = pytest.mark.slow

PROMPT = [(37 * i * i + 11 * i) % 4000 + 10 for i in range(300)]
HIT_TOKENS, NEW_TOKENS = 192, 40


@dataclass(frozen=True)
class Family:
    config: PreTrainedConfig
    arguments: tuple[str, ...] = field(default=())
    #: layers of fp16 that SGLang's own pool would hold of a token: fewer where it frees what lies behind windows
    stock_layers: float = 4

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def __str__(self) -> str:
        return f"{self.config.model_type}-{self.head_dim}"


FAMILIES = (
    # SGLang's other kernels for its experts need a GPU.
    Family(random_models.gpt_oss(), ("--moe-runner-backend", "triton"), stock_layers=2 + 2 * 0.8),
    Family(random_models.phi3()),
    Family(random_models.stablelm()),
    Family(random_models.llama(512)),
)


def expected(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """Log-probabilities of token_ids[1:], each given all tokens before it."""
    with torch.inference_mode():
        log_probabilities = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    return log_probabilities[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def assert_agree(found: list[float], wanted: list[float]) -> None:
    differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
    assert sum(differences) / len(differences) < budgets.SERVED_RAW_MEAN_NATS
    assert max(differences) < budgets.SERVED_RAW_LARGEST_NATS


def answers(server: Server) -> tuple[list[float], list[float], list[int], list[float]]:
    """Log-probabilities: of the whole prompt in chunks, of its second part behind its cached first part; and what is
    then written, token by token, with its own."""
    cold = score(server, PROMPT, 1)
    flush(server)
    score(server, PROMPT[:HIT_TOKENS], 1)
    hit = score(server, PROMPT, HIT_TOKENS)
    answer = generate(server, PROMPT, NEW_TOKENS, return_logprob=True)
    return cold, hit, answer["output_ids"], [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_raw_pages_agree(family: Family, tmp_path: Path) -> None:
    model = random_models.made(family.config)
    model.save_pretrained(tmp_path / "model")
    model.set_attn_implementation("eager")
    arguments = (
        *BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED, "--kv-compress-tier", "raw",
        "--max-total-tokens", "4096", "--chunked-prefill-size", "128", *family.arguments,
    )  # fmt: skip
    with serve(tmp_path / "model", arguments, log_path=tmp_path / "log") as server:
        cold, hit, written, decoded = answers(server)
        fp16_bytes_per_token = server.store_stats().fp16_bytes_per_token
    heads = family.config.num_key_value_heads
    assert fp16_bytes_per_token == pytest.approx(family.stock_layers * heads * family.head_dim * 2 * 2)
    whole = expected(model, PROMPT + written)
    assert_agree(cold, whole[: len(PROMPT) - 1])
    assert_agree(hit, whole[HIT_TOKENS - 1 : len(PROMPT) - 1])
    assert_agree(decoded, whole[len(PROMPT) - 1 :])
