"""Mixture-of-experts models, whose SGLang code asks the backend for its pool in the middle of a forward."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_deltastore.host.server_process import Server, serve
from tests import budgets
from tests.e2e import random_models
from tests.e2e.client import flush, score
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED

pytestmark = pytest.mark.slow

PROMPT = [(37 * i * i + 11 * i) % 4000 + 10 for i in range(300)]
HIT_TOKENS = 192


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models.save(random_models.qwen3_moe(), tmp_path_factory.mktemp("qwen3-moe"))


def scores(server: Server) -> tuple[list[float], list[float]]:
    """Log-probabilities of the prompt's second part: cold, and behind its cached first part."""
    cold = score(server, PROMPT, HIT_TOKENS)
    flush(server)
    score(server, PROMPT[:HIT_TOKENS], 1)
    return cold, score(server, PROMPT, HIT_TOKENS)


def test_qwen3_moe_s_raw_pages_agree_with_stock(folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, arguments in (
        ("stock", ("--attention-backend", "torch_native", "--page-size", "16")),
        ("raw", (*DELTASTORE, *UNCALIBRATED, "--kv-compress-tier", "raw")),
    ):
        whole = (*BASE_ARGUMENTS, *random_models.ARGUMENTS, "--max-total-tokens", "2048", *arguments)
        with serve(folder, whole, log_path=tmp_path / name) as server:
            found[name] = scores(server)
    for ours, stock in zip(found["raw"], found["stock"], strict=True):
        assert max(abs(a - b) for a, b in zip(ours, stock, strict=True)) < budgets.SERVED_RAW_NATS
    # A wrong page or head would show: other words before them change the same log-probabilities a hundred times more.
