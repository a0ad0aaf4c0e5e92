"""Calibrated servers, on the compiled kernels and on their twins, against the model itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltastore_kernels.layout import Format
from sglang_deltastore import cli
from sglang_deltastore.host.server_process import Server
from sglang_deltastore.policy import calibration
from sglang_deltastore.policy.calibration import CalibrationError
from tests import budgets
from tests.e2e.client import flush, generate, score
from tests.e2e.conftest import StartServer, of_ranks
from tests.e2e.test_start import model_folder, resolve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCORED_FROM, SCORED_TO = 150, 350  # the twins are slow


@pytest.fixture(scope="module")
def calibration_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick calibration, with formats that differ from layer to layer."""
    path = tmp_path_factory.mktemp("calibration") / "smollm2.safetensors"
    command = ["calibrate", "--model", str(smollm2), "--text", str(ROOT / "LICENSE"), "-o", str(path)]
    assert cli.main([*command, "--sequences", "4", "--tokens", "256"]) == 0
    made = calibration.load(path)
    formats = tuple(Format(4, 4) if layer % 2 else Format(3, 3) for layer in range(30))
    replace(made, formats={"lossless": formats}).save(path)
    return path


@pytest.fixture(scope="module")
def text_ids(smollm2: Path) -> list[int]:
    """Of a text that nobody edits: the budgets were measured on it."""
    from transformers import AutoTokenizer

    text = Path(__file__).with_name("scored_text.txt").read_text()
    return AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"][:SCORED_TO]


@pytest.fixture(scope="module")
def truth(smollm2: Path, text_ids: list[int]) -> list[float]:
    """Log-probabilities of the text's tokens from SCORED_FROM on, by the model with a plain cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([text_ids])).logits[0].log_softmax(-1)
    rows = torch.arange(SCORED_FROM - 1, len(text_ids) - 1)
    return logprobs[rows, torch.tensor(text_ids[SCORED_FROM:])].tolist()


def difference(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def score_behind_cache(server: Server, ids: list[int]) -> list[float]:
    flush(server)
    generate(server, ids[: SCORED_FROM - 1])
    return score(server, ids, from_token=SCORED_FROM)


def test_calibrated_servers(
    start_server: StartServer, calibration_file: Path, text_ids: list[int], truth: list[float]
) -> None:
    """Scored behind a cached prefix, by the compiled kernels and by their twins."""
    scores = {}
    calibrated = ("--kv-compress", "deltastore", "--kv-compress-calibration", str(calibration_file))
    for name, arguments in {"compiled": (), "twins": ("--kv-compress-kernels", "reference")}.items():
        server = start_server(*calibrated, *arguments, "--max-total-tokens", "2048")
        stats = server.store_stats()
        assert (stats.calibrated, stats.format) == (True, "K3.5V3.5 by layer")
        scores[name] = score_behind_cache(server, text_ids)
        if name == "compiled":
            assert score_behind_cache(server, text_ids) == scores[name], "hits are not bit-identical"
        stats = server.settled_stats()
        assert (stats.census_current, stats.accounting_errors) == (True, ())
        assert (stats.sink_evictions, stats.sinks_total - stats.sinks_free) == (0, 1)
        server.process.terminate()
        server.process.wait(60)
    assert difference(scores["compiled"], truth) < budgets.SERVED_CALIBRATED_NATS
    assert difference(scores["compiled"], scores["twins"]) < budgets.SERVED_KERNELS_NATS


def test_tensor_parallel_ranks_store_their_own_heads(
    start_server: StartServer, calibration_file: Path, text_ids: list[int], truth: list[float]
) -> None:
    """Three ranks of one KV head each."""
    server = start_server(
        "--kv-compress", "deltastore", "--kv-compress-calibration", str(calibration_file),
        "--max-total-tokens", "2048", "--tensor-parallel-size", "3",
        environ=os.environ | of_ranks(3),
        start_timeout_s=1200,
    )  # fmt: skip
    assert difference(score_behind_cache(server, text_ids), truth) < budgets.SERVED_CALIBRATED_NATS
    stats = server.settled_stats()
    assert (stats.census_current, stats.accounting_errors) == (True, ())
    assert stats.fp16_bytes_per_token == 30 * 1 * 64 * 2 * 2
    server.process.terminate()
    server.process.wait(60)


def test_a_calibration_of_another_model_is_refused_in_the_launcher(
    tmp_path: Path, smollm2: Path, calibration_file: Path
) -> None:
    other = model_folder(tmp_path, smollm2, rope_theta=1234.0)
    for weights in smollm2.glob("*.safetensors"):  # while they are still to be downloaded, nobody can tell
        (other / weights.name).symlink_to(weights)
    with pytest.raises(CalibrationError, match="made for a model with fingerprint"):
        resolve(other, kv_compress_calibration=str(calibration_file))
    with pytest.raises(CalibrationError, match="deltastore calibrate"):
        resolve(smollm2, kv_compress_calibration=str(tmp_path / "missing.safetensors"))
    resolve(smollm2, kv_compress_calibration=str(calibration_file))
