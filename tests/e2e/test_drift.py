"""Whether a server notices that it serves something else than what it was calibrated for."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_deltastore.host.server_process import Server
from sglang_deltastore.observe.stats import StoreStats
from sglang_deltastore.policy.calibration import load
from tests.e2e.client import flush, generate
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: The first layers of SmolLM2: their queries are the whole model's, and are judged in a seventh of the time.
LAYERS = 4
PROMPT_TOKENS, MOST_SECONDS = 512, 300
"""Each layer is judged by 683 tokens, 128 of a prompt, and then nothing is looked at for some seconds: how many prompts
that is depends on the machine."""


def test_a_calibration_for_other_queries_is_found_stale(
    start_server: StartServer, smollm2: Path, tmp_path: Path
) -> None:
    """First one on text like what is served, then one in which each layer has another's basis."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "".join((DOCS / name).read_text() for name in ("laboratory.md", "serving.md", "observing.md"))
    ids = tokenizer(text)["input_ids"]
    (tmp_path / "text").write_text(tokenizer.decode(ids[:1000]))
    prompts = [ids[at : at + PROMPT_TOKENS] for at in range(1000, len(ids) - PROMPT_TOKENS, 150)]

    def served(*calibration: str) -> tuple[StoreStats, str]:
        server = start_server(
            *DELTASTORE, *calibration, "--max-total-tokens", "2048",
            "--json-model-override-args", json.dumps({"num_hidden_layers": LAYERS}),
            environ=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, start_timeout_s=1200,
        )  # fmt: skip
        assert server.store_stats().calibration_staleness == 0, "nothing is known yet"
        stats = judged(server, prompts)
        server.process.terminate()
        server.process.wait(60)
        return stats, server.log_path.read_text()

    own, own_log = served("--kv-compress-calibration", "auto", "--kv-compress-calibration-text", str(tmp_path / "text"))
    (made,) = (load(path) for path in tmp_path.rglob("*.safetensors"))
    replace(made, layers=made.layers[::-1]).save(tmp_path / "mixed_up.safetensors")
    other, other_log = served("--kv-compress-calibration", str(tmp_path / "mixed_up.safetensors"))
    assert 1 < own.calibration_staleness <= own.worst_layer_staleness
    # As a transformers model's queries have it: 1.14, 1.4 where the text is one word again and again, and 3.7.
    assert other.calibration_staleness > 2 * own.calibration_staleness
    for stats, log, stale in ((own, own_log, False), (other, other_log, True)):
        assert stats.recalibration_pays == ("unlike the text of the calibration" in log) == stale
        assert stats.observation_errors == 0


def judged(server: Server, prompts: list[list[int]]) -> StoreStats:
    """The facts once every layer has been judged."""
    until = time.monotonic() + MOST_SECONDS
    for prompt in itertools.cycle(prompts):
        generate(server, prompt)
        flush(server)  # all of every prompt is computed
        if (stats := server.store_stats()).calibration_staleness:
            return stats
        assert time.monotonic() < until, f"{MOST_SECONDS} s have not judged {LAYERS} layers"
    raise AssertionError("no prompts")
