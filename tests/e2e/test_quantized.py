"""Checkpoints that are no folder of plain weights: calibrated as SGLang has loaded them, and served.

Of the formats for quantized weights SGLang 0.5.23 runs none on a CPU without AMX; a GGUF file of 16-bit floats it does.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sglang_deltastore.host.server_process import serve
from sglang_deltastore.policy.calibration import cached_path, fingerprint, load
from sglang_deltastore.policy.calibration_text import name_of
from tests.e2e.client import generate
from tests.e2e.quantized_models import gguf_copy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_a_gguf_file_is_calibrated_as_it_is_loaded(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = gguf_copy(smollm2, tmp_path / "gguf"), tmp_path / "text"
    text.write_text((ROOT / "LICENSE").read_text()[:4000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = (
        "--device", "cpu", "--dtype", "float16", "--kv-compress", "deltastore", "--max-total-tokens", "2048",
        "--kv-compress-calibration-text", str(text),
    )  # fmt: skip
    answers, logs = [], []
    for start in ("first", "second"):
        log_path = tmp_path / start
        with serve(model, arguments, log_path=log_path, environ=dict(os.environ), start_timeout_s=1200) as server:
            assert server.store_stats().calibrated
            answers.append(generate(server, list(range(1000, 1100)), tokens=8)["output_ids"])
        logs.append(log_path.read_text())
    assert ["calibrates itself for this model, once" in log for log in logs] == [True, False]
    assert answers[0] == answers[1]
    made = load(cached_path(fingerprint(model), name_of(text.read_text())))
    assert made.fingerprint != fingerprint(smollm2)
    assert all(layer.mean.isfinite().all() and layer.mean.std() > 0 for layer in made.layers)
    assert not torch.equal(made.layers[0].mean, made.layers[1].mean)
