"""The calibration file: what is written is read, and only for the model it was made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format
from sglang_deltastore import calibration
from sglang_deltastore.calibration import Calibration, CalibrationError, cached_path, fingerprint, load, resolve

HEADS, HEAD_DIM = 2, 32


def model_folder(path: Path, seed: int = 0, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"hidden_size": 64, **config}))
    save_file({"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))}, path / "model.safetensors")
    return path


def made(model_fingerprint: str) -> Calibration:
    shapes = ((HEADS, HEAD_DIM), *[(HEADS, HEAD_DIM, HEAD_DIM)] * 3)
    layers = tuple(KeyBasis(*(torch.randn(shape) for shape in shapes)) for _ in range(3))
    return Calibration(model_fingerprint, layers, {"k4v2": (Format(4, 2), Format(3, 3), Format(4, 2))})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("ranks", "heads"), [(1, [[0, 1]]), (2, [[0], [1]]), (4, [[0], [0], [1], [1]])])
def test_each_rank_has_its_own_heads(ranks: int, heads: list[list[int]]) -> None:
    whole = made("abc")
    for rank in range(ranks):
        part = whole.of_rank(rank, ranks)
        assert part.formats == whole.formats
        for own, all_heads in zip(part.layers, whole.layers, strict=True):
            assert torch.equal(own.mean, all_heads.mean[heads[rank]])
            assert torch.equal(own.shaping, all_heads.shaping[heads[rank]])


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    written = made("abc")
    written.save(tmp_path / "deep" / "c.safetensors")
    read = load(tmp_path / "deep" / "c.safetensors")
    assert (read.fingerprint, read.formats) == (written.fingerprint, written.formats)
    for ours, theirs in zip(read.layers, written.layers, strict=True):
        for name in KeyBasis.__dataclass_fields__:
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.safetensors"], "a partial file is left"


def test_a_fingerprint_is_the_model_s(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "a")
    assert fingerprint(model) == fingerprint(model_folder(tmp_path / "b"))
    assert fingerprint(model) == fingerprint(model_folder(tmp_path / "c", transformers_version="9", dtype="float32"))
    assert fingerprint(model) != fingerprint(model_folder(tmp_path / "d", seed=1)), "other weights, same shape"
    assert fingerprint(model) != fingerprint(model_folder(tmp_path / "e", rope_theta=1e6))


def test_auto_finds_what_calibrate_left_in_the_cache(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "a")
    assert resolve("auto", model) is None
    made(fingerprint(model)).save(cached_path(fingerprint(model)))
    found = resolve("auto", model)
    assert found is not None
    assert found.fingerprint == fingerprint(model)
    assert resolve("none", model) is None
    assert resolve("auto", None) is None


def test_another_model_s_file_is_refused(tmp_path: Path) -> None:
    model, other = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", seed=1)
    made(fingerprint(other)).save(tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match="made for a model with fingerprint"):
        resolve(str(tmp_path / "c.safetensors"), model)
    with pytest.raises(CalibrationError, match="folder"):
        resolve(str(tmp_path / "c.safetensors"), None)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "a")
    broken, foreign = tmp_path / "broken.safetensors", tmp_path / "foreign.safetensors"
    broken.write_bytes(b"no tensors at all")
    save_file({"w": torch.zeros(1)}, foreign)
    for path in (broken, foreign, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(CalibrationError, match="deltastore calibrate"):
            resolve(str(path), model)


def test_other_layers_are_refused() -> None:
    calibrated = made("abc")
    calibrated.check_shape([HEADS] * 3, HEAD_DIM)
    for heads, head_dim in (([HEADS] * 2, HEAD_DIM), ([HEADS + 1] * 3, HEAD_DIM), ([HEADS] * 3, 64)):
        with pytest.raises(CalibrationError, match="make one for this model"):
            calibrated.check_shape(heads, head_dim)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    made("old").save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(calibration, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        made("new").save(path)
    assert load(path).fingerprint == "old"
