"""A server that meets a model for the first time learns its keys, and the next one finds what it learned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_deltastore.host import variables
from sglang_deltastore.host.server_process import Server, ServerFailed, free_port
from sglang_deltastore.lab.collecting import collecting
from sglang_deltastore.lab.quality_command import load_model
from sglang_deltastore.policy import calibration
from sglang_deltastore.policy.calibration import Calibration, CalibrationError, cached_path, fingerprint, load
from sglang_deltastore.policy.calibration_text import TOKENS, first_positions, name_of, sequences
from sglang_deltastore.policy.moments import key_bases
from tests.e2e.conftest import DELTASTORE, StartServer, of_ranks
from tests.e2e.test_start import model_folder, resolve
from tests.policy.test_calibration import made

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences: short enough to be read in seconds."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text((ROOT / "LICENSE").read_text()[:8000])
    return path


def started(start_server: StartServer, text: Path, cache: Path, *arguments: str, **environ: str) -> Server:
    return start_server(
        *DELTASTORE, "--kv-compress-calibration", "auto", "--kv-compress-calibration-text", str(text),
        "--max-total-tokens", "2048", *arguments,
        environ=os.environ | {"XDG_CACHE_HOME": str(cache)} | environ, start_timeout_s=1200,
    )  # fmt: skip


def stop(server: Server) -> str:
    server.process.terminate()
    server.process.wait(60)
    return server.log_path.read_text()


def made_in(cache: Path, smollm2: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return load(cached_path(fingerprint(smollm2), name_of(text.read_text())))


def test_the_first_start_calibrates_the_second_reads_and_three_ranks_or_transformers_make_the_same(
    start_server: StartServer, smollm2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, transformers, three = tmp_path / "one", tmp_path / "transformers", tmp_path / "three"
    server = started(start_server, text, one)
    assert server.store_stats().calibrated
    log = stop(server)
    assert "calibrates itself for this model, once" in log and "calibrated in " in log
    server = started(start_server, text, one, "--kv-compress-tier", "k4v2")
    stats = server.store_stats()
    assert (stats.calibrated, stats.format) == (True, "K3V3"), "in the bytes of K4V2"
    assert "calibrates itself" not in stop(server)
    alone = made_in(one, smollm2, text, monkeypatch)
    close_to(alone, by_the_lab(smollm2, text, alone.fingerprint))

    server = started(start_server, text, transformers, "--model-impl", "transformers")
    assert server.store_stats().calibrated
    assert "TransformersForCausalLM" in stop(server)
    close_to(alone, made_in(transformers, smollm2, text, monkeypatch))

    server = started(start_server, text, three, "--tensor-parallel-size", "3", **of_ranks(3))
    assert server.store_stats().calibrated
    stop(server)
    close_to(alone, made_in(three, smollm2, text, monkeypatch))


@torch.inference_mode()
def by_the_lab(smollm2: Path, text: Path, fingerprint: str) -> Calibration:
    """From the same tokens at the same positions, in a transformers model."""
    model, tokenizer = load_model(smollm2)
    found = sequences(tokenizer, 8, TOKENS, text.read_text())
    firsts = first_positions(len(found), TOKENS, model.config.max_position_embeddings)
    assert len(firsts) > 1 and firsts[-1] + TOKENS == model.config.max_position_embeddings
    with collecting(model) as moments:
        for ids, first in zip(found, firsts, strict=True):
            model.base_model(ids[None], position_ids=torch.arange(first, first + len(ids))[None], use_cache=False)
    return Calibration(fingerprint, key_bases(moments), {})


def close_to(one: Calibration, other: Calibration) -> None:
    """Sums of attention's outputs are rounded in another order, by ranks or by other code, in each layer anew."""
    assert other.fingerprint == one.fingerprint
    for ours, theirs in zip(other.layers, one.layers, strict=True):
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours.rotation, theirs.rotation, rtol=5e-2, atol=5e-2)


def test_a_start_that_is_killed_while_it_calibrates_is_followed_by_one_that_does(
    start_server: StartServer, smollm2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped text takes long enough to be killed in."""
    environ, log_path = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "log"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(smollm2), "--port", str(free_port())]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", *DELTASTORE], stdout=log, stderr=log,
            env=environ | variables(environ), start_new_session=True,
        )  # fmt: skip
    try:
        while "calibrates itself for this model, once" not in log_path.read_text():
            assert process.poll() is None, log_path.read_text()
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.rglob("*.safetensors"))
    server = started(start_server, text, tmp_path)
    assert server.store_stats().calibrated
    stop(server)
    assert made_in(tmp_path, smollm2, text, monkeypatch)


def test_a_cache_that_cannot_be_written_to_is_said_and_a_text_too_short_is_refused(
    start_server: StartServer, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "deltastore").write_text("a file where the folder should be")
    server = started(start_server, text, tmp_path)
    assert server.store_stats().calibrated
    log = stop(server)
    assert "cannot be written to" in log and "calibration: made at this start, and not kept" in log
    short = tmp_path / "short"
    short.write_text("Too little to say anything about a model. " * 10)
    with pytest.raises(ServerFailed, match="exit code 78") as failed:
        started(start_server, short, tmp_path)
    assert "the text to calibrate on has 9" in str(failed.value) and "allowed is 256 and more" in str(failed.value)


@pytest.mark.parametrize("damage", ["a flipped byte", "an older version", "nothing"])
def test_a_calibration_that_cannot_be_used_is_refused_in_the_launcher(
    smollm2: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    with monkeypatch.context() as older:
        if damage == "an older version":
            older.setattr(calibration, "VERSION", "1")
        replace(made("abc"), fingerprint=fingerprint(smollm2)).save(path)
    if damage == "a flipped byte":
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    complaint = {"a flipped byte": "damaged", "an older version": "found 1"}.get(damage)
    with pytest.raises(CalibrationError, match=complaint) if complaint else nullcontext():
        resolve(smollm2, kv_compress_calibration=str(path))


def test_a_calibration_is_not_compared_with_weights_that_are_not_there_yet(smollm2: Path, tmp_path: Path) -> None:
    """Of a model on the Hub, the launcher has the configuration first."""
    path = tmp_path / "c.safetensors"
    made("abc").save(path)
    with pytest.raises(CalibrationError, match="made for a model with fingerprint"):
        resolve(smollm2, kv_compress_calibration=str(path))
    (tmp_path / "folder").mkdir()
    resolve(model_folder(tmp_path / "folder", smollm2), kv_compress_calibration=str(path))
    with pytest.raises(CalibrationError, match="cannot be read"):
        resolve(tmp_path / "folder", kv_compress_calibration=str(tmp_path / "missing"))


def test_a_text_that_cannot_be_used_is_refused_in_the_launcher(smollm2: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read as text"):
        resolve(smollm2, kv_compress_calibration_text=str(tmp_path / "missing"))
    (tmp_path / "empty").write_text("")
    with pytest.raises(CalibrationError, match="is empty"):
        resolve(smollm2, kv_compress_calibration_text=str(tmp_path / "empty"))
    resolve(smollm2, kv_compress_calibration_text=str(text))
