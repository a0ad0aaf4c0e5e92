"""Who calibrates, when, and what becomes of it: the part around the model, which tests/e2e/test_first_start.py runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltastore_kernels.context import Scoring
from sglang_deltastore.policy import calibration as policy
from sglang_deltastore.policy.calibration import Calibration, CalibrationError, load
from sglang_deltastore.policy.moments import Moments, joined
from sglang_deltastore.seam import calibrating, raw_pass
from tests.policy.test_calibration import made

ONE = SimpleNamespace(world_size=1, rank_in_group=0)


@pytest.fixture
def made_times(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that something was calibrated."""
    times: list[None] = []

    def calibrated(*_args: Any) -> Calibration:
        times.append(None)
        return made("abc")

    monkeypatch.setattr(calibrating, "get_tp_group", lambda: ONE)
    monkeypatch.setattr(calibrating, "_calibrated", calibrated)
    return times


def wait_for(happened: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    return happened()


def once(path: Path | None) -> tuple[Calibration | None, str]:
    return calibrating.calibrate_once(SimpleNamespace(), [], "abc", path, None)


def test_what_was_made_is_found_by_the_next_start(tmp_path: Path, made_times: list[None]) -> None:
    path = tmp_path / "calibrations" / "abc.safetensors"
    for _ in range(2):
        calibration, source = once(path)
        assert (calibration.fingerprint, source) == ("abc", str(path))
    assert len(made_times) == 1
    assert torch.equal(load(path).layers[0].mean, calibration.layers[0].mean)


def test_servers_that_start_together_calibrate_once(
    tmp_path: Path, made_times: list[None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    slow, begun = threading.Event(), threading.Event()
    original: Callable[..., Calibration] = calibrating._calibrated

    def calibrated(*args: Any) -> Calibration:
        begun.set()
        assert slow.wait(20)
        return original(*args)

    monkeypatch.setattr(calibrating, "_calibrated", calibrated)
    path, found = tmp_path / "abc.safetensors", []
    threads = [threading.Thread(target=lambda: found.append(once(path)[1])) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    assert wait_for(lambda: "waits for another server" in caplog.text)
    slow.set()
    for thread in threads:
        thread.join(20)
    assert (found, len(made_times)) == ([str(path)] * 2, 1)


def test_a_start_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, made_times: list[None]) -> None:
    path = tmp_path / "abc.safetensors"
    (tmp_path / "abc.safetensors.lock").touch()
    (tmp_path / "abc.safetensors.123.partial").write_bytes(b"half")
    assert once(path)[1] == str(path)
    assert len(made_times) == 1


def test_a_cache_that_can_only_be_read_is_read(
    tmp_path: Path, made_times: list[None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "abc.safetensors"
    made("abc").save(path)
    monkeypatch.setattr(calibrating, "FileLock", lambda _: pytest.fail("asked for a lock"))
    assert once(path)[1] == str(path)
    assert (made_times, caplog.text) == ([], "")


def older(path: Path) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "VERSION", "1")
        made("abc").save(path)
    return path.read_bytes()


@pytest.mark.parametrize("broken", [lambda _: b"", lambda _: b"no safetensors", older])
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, made_times: list[None], broken: Callable[[Path], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "abc.safetensors"
    path.write_bytes(broken(path))
    assert once(path)[1] == str(path)
    assert (len(made_times), load(path).fingerprint) == (1, "abc")
    assert "is not used" in caplog.text


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, made_times: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "calibrations").write_text("a file where the folder should be")
    calibration, source = once(tmp_path / "calibrations" / "abc.safetensors")
    assert (calibration.fingerprint, source) == ("abc", "made at this start, and not kept")
    assert "cannot be written to" in caplog.text


def test_a_full_disk(
    tmp_path: Path, made_times: list[None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Calibration, "save", full)
    calibration, source = once(tmp_path / "abc.safetensors")
    assert (calibration.fingerprint, source) == ("abc", "made at this start, and not kept")
    assert "No space left" in caplog.text


def test_whatever_fails_on_the_way_costs_quality_and_not_the_server(
    tmp_path: Path, made_times: list[None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_args: Any) -> None:
        raise RuntimeError("this model is odd")

    monkeypatch.setattr(calibrating, "_calibrated", fails)
    assert once(tmp_path / "abc.safetensors") == (None, "none, because calibrating failed")
    assert "this model is odd" in caplog.text
    monkeypatch.setattr(calibrating, "_calibrated", lambda *_args: (_ for _ in ()).throw(CalibrationError("short")))
    with pytest.raises(CalibrationError, match="short"):
        once(tmp_path / "abc.safetensors")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_head_that_cannot_be_fitted_is_named_and_what_cannot_be_at_all_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    moments, broken = Moments(), Moments()
    query, key = torch.randn(50, 4, 32, generator=generator), torch.randn(50, 2, 32, generator=generator)
    moments.add(query, key)
    key[9, 1, 3] = torch.nan
    broken.add(query, key)
    assert calibrating._fitted([[moments, broken]], [1, 1], "abc").fingerprint == "abc"
    assert "layer 1, KV heads [1]: keys or queries that no basis can be fitted to" in caplog.text

    def fails(self: Moments) -> None:
        raise torch.linalg.LinAlgError("no eigenvalues")

    monkeypatch.setattr(Moments, "fit", fails)
    assert calibrating._fitted([[moments]], [1], "abc") is None
    assert "no eigenvalues" in caplog.text


def test_ranks_that_share_a_head_are_joined() -> None:
    """Two KV heads on four ranks: two in a row have the same keys, each half of the queries."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(50, 8, 32, generator=generator), torch.randn(50, 2, 32, generator=generator)
    whole, parts = Moments(), [Moments() for _ in range(4)]
    whole.add(query, key)
    for rank, part in enumerate(parts):
        part.add(query[:, 2 * rank : 2 * rank + 2], key[:, rank // 2 : rank // 2 + 1])
    together, alone = joined(parts, 2).fit().basis, whole.fit().basis
    for name in ("mean", "rotation", "query_rotation", "shaping"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize("sink_logits", [None, torch.tensor([-2.0, 0.0, 1.0, 3.0])])
def test_attention_while_observing_is_plain_attention(
    window: int | None, soft_cap: float, sink_logits: torch.Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(70, heads, 32, generator=generator) for heads in (4, 2, 2))
    scoring = Scoring(0.2, soft_cap, window)
    got = raw_pass.attend(query, key, value, scoring, sink_logits)
    at = torch.arange(70)
    for head in range(4):
        scores = query[:, head] @ key[:, head // 2].T * 0.2
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        hidden = (at > at[:, None]) | (at < at[:, None] - (70 if window is None else window))
        weights = scores.masked_fill(hidden, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True) + (0 if sink_logits is None else sink_logits[head].exp())
        wanted = weights / total @ value[:, head // 2]
        torch.testing.assert_close(got[:, head], wanted, rtol=1e-4, atol=1e-5)
