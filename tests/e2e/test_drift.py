"""Whether a server notices that it serves something else than what it was calibrated for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sglang_deltastore.host.server_process import Server
from sglang_deltastore.observe.stats import StoreStats
from tests.e2e.client import flush, generate
from tests.e2e.conftest import DELTASTORE, StartServer

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: The first layers of SmolLM2: their queries are the whole model's, and are judged in a seventh of the time.
LAYERS = 4
PROMPT_TOKENS, MOST_PROMPTS = 512, 60
"""Half of these prompts judge four layers by 683 tokens each, 128 of a prompt."""


def test_a_calibration_on_something_else_is_found_stale(
    start_server: StartServer, smollm2: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "".join((DOCS / name).read_text() for name in ("laboratory.md", "serving.md", "observing.md"))
    ids = tokenizer(text)["input_ids"]
    (tmp_path / "alike").write_text(tokenizer.decode(ids[:1000]))
    (tmp_path / "other").write_text("yes " * 1000)
    prompts = [ids[at : at + PROMPT_TOKENS] for at in range(1000, len(ids) - PROMPT_TOKENS, 150)]

    stats, logs = {}, {}
    for name in ("alike", "other"):
        server = start_server(
            *DELTASTORE, "--kv-compress-calibration", "auto", "--kv-compress-calibration-text", str(tmp_path / name),
            "--json-model-override-args", json.dumps({"num_hidden_layers": LAYERS}), "--max-total-tokens", "2048",
            environ=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, start_timeout_s=1200,
        )  # fmt: skip
        assert server.store_stats().calibration_staleness == 0, "nothing is known yet"
        stats[name] = judged(server, prompts)
        server.process.terminate()
        server.process.wait(60)
        logs[name] = server.log_path.read_text()
    alike, other = stats["alike"], stats["other"]
    assert 1 < alike.calibration_staleness <= alike.worst_layer_staleness
    assert other.calibration_staleness > 1.25 * alike.calibration_staleness
    assert (alike.recalibration_pays, other.recalibration_pays) == (False, True)
    assert ["unlike the text of the calibration" in logs[name] for name in ("alike", "other")] == [False, True]
    assert (alike.observation_errors, other.observation_errors) == (0, 0)


def judged(server: Server, prompts: list[list[int]]) -> StoreStats:
    """The facts once every layer has been judged."""
    for turn in range(MOST_PROMPTS):
        generate(server, prompts[turn % len(prompts)])
        flush(server)  # all of every prompt is computed
        if (stats := server.store_stats()).calibration_staleness:
            return stats
    raise AssertionError(f"{MOST_PROMPTS} prompts of {PROMPT_TOKENS} tokens have not judged {LAYERS} layers")
