"""Attention of other shapes than most models have, against transformers' eager attention on the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

from sglang_deltastore.host.server_process import serve
from tests import budgets
from tests.e2e import random_models
from tests.e2e.client import score
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED, or_long
from tests.e2e.judged import Judged, prompt

pytestmark = pytest.mark.slow

PROMPT, HIT_TOKENS = prompt(300), 192


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


@pytest.mark.parametrize("family", or_long(FAMILIES, [each for each in FAMILIES if str(each) != "phi3-96"]), ids=str)
def test_raw_pages_agree(family: Family, tmp_path: Path) -> None:
    model = random_models.made(family.config)
    model.save_pretrained(tmp_path / "model")
    model.set_attn_implementation("eager")
    arguments = (
        *BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED, "--kv-compress-tier", "raw",
        "--max-total-tokens", "4096", "--chunked-prefill-size", "128", *family.arguments,
    )  # fmt: skip
    with serve(tmp_path / "model", arguments, log_path=tmp_path / "log") as server:
        judged = Judged(server, model, budgets.SERVED_RAW_MEAN_NATS, budgets.SERVED_RAW_LARGEST_NATS)
        judged.check(score(server, PROMPT, from_token=1), PROMPT)
        judged.check_hit(PROMPT, HIT_TOKENS, HIT_TOKENS)
        fp16_bytes_per_token = server.store_stats().fp16_bytes_per_token
    heads = family.config.num_key_value_heads
    assert fp16_bytes_per_token == pytest.approx(family.stock_layers * heads * family.head_dim * 2 * 2)
