"""SGLang's own model classes: those that are served, and those refused at start by what they are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REFUSED = {
    "gemma3n_causal": "layer 2 (Gemma3nAttention): is_kv_shared_layer is True; allowed is False",
    "iquest_loopcoder": "layer 0 (LoopCoderAttention): an argument of its attention is k and v None",
}
SERVED = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_causal", "granite", "granitemoe", "olmo2", "glm4"),
    *("stablelm", "gpt_oss", "transformers"),
)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.e2e.built_models"],
        capture_output=True, text=True, timeout=600, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", SERVED)
def test_is_served(verdicts: dict[str, str], module: str) -> None:
    assert verdicts[module] == "served"


@pytest.mark.parametrize("module", REFUSED)
def test_is_refused_by_name(verdicts: dict[str, str], module: str) -> None:
    assert REFUSED[module] in verdicts[module]
    assert "serve this model with --kv-compress none" in verdicts[module]


def test_every_built_model_is_one_or_the_other(verdicts: dict[str, str]) -> None:
    assert set(verdicts) == {*SERVED, *REFUSED}
