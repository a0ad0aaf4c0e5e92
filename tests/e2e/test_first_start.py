"""A server that meets a model for the first time learns its keys, and the next one finds what it learned."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sglang_deltastore.host.server_process import Server
from sglang_deltastore.policy.calibration import Calibration, CalibrationError, cached_path, fingerprint, load
from sglang_deltastore.policy.calibration_text import name_of
from tests.e2e.conftest import DELTASTORE, StartServer
from tests.e2e.test_calibrated import resolve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short enough to be read in seconds."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text((ROOT / "LICENSE").read_text()[:4000])
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

    server = started(start_server, text, transformers, "--model-impl", "transformers")
    assert server.store_stats().calibrated
    assert "TransformersForCausalLM" in stop(server)
    close_to(alone, made_in(transformers, smollm2, text, monkeypatch))

    cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(3))
    ranks = {"SGLANG_CPU_OMP_THREADS_BIND": cores, "SGLANG_NCCL_SO_PATH": "none"}
    server = started(start_server, text, three, "--tensor-parallel-size", "3", **ranks)
    assert server.store_stats().calibrated
    stop(server)
    close_to(alone, made_in(three, smollm2, text, monkeypatch))


def close_to(one: Calibration, other: Calibration) -> None:
    """Sums of attention's outputs are rounded in another order, by ranks or by other code, in each layer anew."""
    assert other.fingerprint == one.fingerprint
    for ours, theirs in zip(other.layers, one.layers, strict=True):
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours.rotation, theirs.rotation, rtol=5e-2, atol=5e-2)


def test_a_text_that_cannot_be_used_is_refused_in_the_launcher(smollm2: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read as text"):
        resolve(smollm2, kv_compress_calibration_text=str(tmp_path / "missing"))
    (tmp_path / "empty").write_text("")
    with pytest.raises(CalibrationError, match="is empty"):
        resolve(smollm2, kv_compress_calibration_text=str(tmp_path / "empty"))
    resolve(smollm2, kv_compress_calibration_text=str(text))
