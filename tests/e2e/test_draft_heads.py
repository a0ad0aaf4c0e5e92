"""Heads that draft for a model, without training: the tokens of plain decoding, though they say nothing of use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_deltastore.host.server_process import serve
from tests import budgets
from tests.e2e import draft_heads, random_models
from tests.e2e.client import generate, prompt
from tests.e2e.conftest import BASE_ARGUMENTS, DELTASTORE, UNCALIBRATED, draft_model
from tests.e2e.test_batches import differences

pytestmark = pytest.mark.slow

PROMPT_TOKENS, ANSWER_TOKENS, CAPACITY_TOKENS, PAGE_TOKENS = 50, 40, 2048, 16
VOCABULARY = 4096
NOISE = ("--speculative-draft-load-format", "dummy")


def mtp(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A model, and arguments with which its own layer for multi-token prediction drafts."""
    model = random_models.save(random_models.mimo(), folder / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["MiMoForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    return model, draft_model(model, "NEXTN")


def eagle3(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A head reads the hidden states of three layers, which SGLang chooses; its own KV may be narrower than it."""
    config = random_models.llama(64)
    config.num_hidden_layers = 8
    model = random_models.save(config, folder / "model")
    return model, (*draft_model(draft_heads.eagle3(model, folder / "head"), "EAGLE3"), "--kv-cache-dtype", "bf16")


@pytest.mark.parametrize(("made", "token_bytes"), [(mtp, 2 * 64 * 2 * 4), (eagle3, 64 * 2 * 2)])
def test_tokens_are_those_of_plain_decoding(
    made: Callable[[Path], tuple[Path, tuple[str, ...]]], token_bytes: int, tmp_path: Path
) -> None:
    """token_bytes: of the draft's own KV, one layer's keys and values of 64 dims a head."""
    model, drafts = made(tmp_path)
    common = (*BASE_ARGUMENTS, *random_models.ARGUMENTS, *DELTASTORE, *UNCALIBRATED, "--kv-compress-tier", "raw")
    common = (*common, "--max-total-tokens", str(CAPACITY_TOKENS), "--max-running-requests", "2")
    prompts = [[token % VOCABULARY for token in prompt(PROMPT_TOKENS, seed)] for seed in range(3)]
    found = []
    for name, arguments in (("plain", ()), ("drafts", (*drafts, *NOISE))):
        with serve(model, (*common, *arguments), log_path=tmp_path / name) as server:
            answers = [generate(server, ids, ANSWER_TOKENS, return_logprob=True)["meta_info"] for ids in prompts]
            stats = server.settled_stats()
            assert (stats.census_current, stats.accounting_errors, stats.observation_errors) == (True, (), 0)
            found.append([[(entry[1], entry[0]) for entry in meta["output_token_logprobs"]] for meta in answers])
    assert answers[0]["spec_verify_ct"] > ANSWER_TOKENS / 2
    assert stats.draft_pool_bytes == (CAPACITY_TOKENS + PAGE_TOKENS) * token_bytes
    moved = [moved for pair in zip(*found, strict=True) for moved in differences(*pair)]
    assert sum(moved) / len(moved) < budgets.SPECULATION_NATS["raw"]
    plain, drafted = ([[token for token, _ in answer] for answer in answers] for answers in found)
    assert drafted == plain
