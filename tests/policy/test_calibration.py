"""The calibration file: what is written is read, and only for the model it was made for."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format
from sglang_deltastore.policy import calibration
from sglang_deltastore.policy.calibration import Calibration, CalibrationError, cached_path, fingerprint, load, resolve
from sglang_deltastore.policy.tiers import TIERS
from sglang_deltastore.seam.deployment import local_folder

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


def test_layers_that_cap_their_scores_have_no_means_whatever_the_file_says() -> None:
    whole = made("abc")
    layers = whole.without_means([False, True, False]).layers
    assert [bool(layer.mean.any()) for layer in layers] == [True, False, True]
    assert torch.equal(layers[1].rotation, whole.layers[1].rotation)


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


def test_a_fingerprint_sees_one_tensor_of_many_and_no_dates(tmp_path: Path) -> None:
    """As when one layer is trained on, or a file is copied."""
    model, layers = model_folder(tmp_path / "a"), 64
    weights = model / "model.safetensors"
    save_file({f"layer{index}": torch.randn(256, 128) for index in range(layers)}, weights)
    before, whole = fingerprint(model), weights.read_bytes()
    os.utime(weights, (1, 1))
    assert fingerprint(model) == before
    each = 256 * 128 * 4
    for start in range(len(whole) - layers * each, len(whole), each):
        weights.write_bytes(whole[:start] + bytes(each) + whole[start + each :])
        assert fingerprint(model) != before
    weights.write_bytes(whole + b"more")
    assert fingerprint(model) != before


def test_what_is_changed_while_loading_counts(tmp_path: Path) -> None:
    """The configuration as overridden is the model's; other weights have a calibration of their own."""
    model, scaled = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", rope_theta=1e6)
    assert fingerprint(model, {}) == fingerprint(model)
    assert fingerprint(model, {"rope_theta": 1e6}) == fingerprint(scaled)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert fingerprint(file, {"rope_theta": 1e6}) != (alone := fingerprint(file))
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert fingerprint(file) != alone
    made(fingerprint(scaled)).save(tmp_path / "c.safetensors")
    assert resolve(str(tmp_path / "c.safetensors"), model, {"rope_theta": 1e6})
    with pytest.raises(CalibrationError, match="made for a model with fingerprint"):
        resolve(str(tmp_path / "c.safetensors"), model)
    paths = {
        cached_path("abc"),
        cached_path("abc", "text"),
        cached_path("abc", "text", "fp8"),
        cached_path("abc", None, "fp8"),
    }
    assert len(paths) == 4


def test_a_file_of_an_older_version_is_made_anew_in_the_cache_and_refused_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_folder(tmp_path / "a")
    with monkeypatch.context() as older:
        older.setattr(calibration, "VERSION", "2")
        for path in (cached_path(fingerprint(model)), tmp_path / "c.safetensors"):
            made(fingerprint(model)).save(path)
    assert resolve("auto", model) is None
    assert "not a calibration of version 4 (found 2)" in caplog.text
    with pytest.raises(CalibrationError, match=r"version 4 \(found 2\); make one"):
        resolve(str(tmp_path / "c.safetensors"), model)


def test_a_file_for_other_tiers_gives_its_bases_and_each_tier_its_own_format(tmp_path: Path) -> None:
    replace(made("abc"), formats={"of_tomorrow": (Format(4, 4),) * 3}).save(tmp_path / "c.safetensors")
    read = load(tmp_path / "c.safetensors")
    assert read.formats_of(TIERS["lossless"]) == (Format(4, 3),) * 3


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
    calibrated.check_shape([(HEADS, HEAD_DIM)] * 3)
    for heads, head_dim in (([HEADS] * 2, HEAD_DIM), ([HEADS + 1] * 3, HEAD_DIM), ([HEADS] * 3, 64)):
        with pytest.raises(CalibrationError, match="make one for this model"):
            calibrated.check_shape([(each, head_dim) for each in heads])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    made("old").save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(calibration, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        made("new").save(path)
    assert load(path).fingerprint == "old"


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    """A file as `save` writes it, checksum and all, of whatever contents."""
    whole = {"deltastore": calibration.VERSION, "fingerprint": "abc", "formats": "{}", **metadata}
    save_file(tensors, path, {"checksum": calibration._checksum(tensors, whole), **whole})
    return path


def tensors_of(layer: int, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    square = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM)
    plain = {"mean": torch.zeros(HEADS, HEAD_DIM), "rotation": square, "query_rotation": square.clone()}
    return {f"layers.{layer}.{name}": value for name, value in {**plain, "shaping": square.clone(), **changed}.items()}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"shaping": torch.zeros(HEADS, HEAD_DIM)}, r"layers\.1\.shaping .* has shape \(2, 32\), torch\.float32"),
        ({"shaping": torch.zeros(HEADS, 64, 64)}, r"shape \(2, 64, 64\), .* allowed is \(2, 32, 32\)"),
        ({"rotation": torch.zeros(HEADS + 1, HEAD_DIM, HEAD_DIM)}, r"layers\.1\.rotation .* shape \(3, 32, 32\)"),
        ({"mean": torch.zeros(HEADS, HEAD_DIM, 1)}, r"layers\.1\.mean .* shape \(2, 32, 1\)"),
        ({"mean": torch.zeros(HEADS, HEAD_DIM, dtype=torch.float16)}, "float16, .* allowed is .* torch.float32"),
        ({"mean": torch.full((HEADS, HEAD_DIM), torch.nan)}, r"layers\.1\.mean .* has values that are not"),
        ({"query_rotation": torch.full((HEADS, HEAD_DIM, HEAD_DIM), torch.inf)}, "query_rotation .* not finite"),
    ],
)  # fmt: skip
def test_tensors_that_kernels_could_not_take_are_refused(
    tmp_path: Path, changed: dict[str, torch.Tensor], complaint: str
) -> None:
    path = write(tmp_path / "c.safetensors", {**tensors_of(0), **tensors_of(1, **changed)})
    with pytest.raises(CalibrationError, match=complaint):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"formats": "{"}, "JSONDecodeError"),
        ({"formats": "[1]"}, "not what deltastore calibrate writes"),
        ({"formats": '{"k4v2": [[4, 2]]}'}, "formats for tier k4v2 are of 1 layers; allowed is 2"),
        ({"formats": '{"k4v2": [[4, 2], [4, 9]]}'}, "allowed are"),
        ({"formats": '{"k4v2": [[4, 2], [4]]}'}, "not what deltastore calibrate writes"),
        ({"deltastore": "1"}, "not a calibration of version 4"),
        ({"checksum": "0" * 64}, "damaged"),
    ],
)
def test_metadata_that_is_not_sane_is_refused(tmp_path: Path, metadata: dict[str, str], complaint: str) -> None:
    path = tmp_path / "c.safetensors"
    write(path, {**tensors_of(0), **tensors_of(1)}, **metadata)
    with pytest.raises(CalibrationError, match=complaint):
        load(path)


@pytest.mark.parametrize("missing", ["fingerprint", "formats", "checksum"])
def test_metadata_without_a_field_is_refused(tmp_path: Path, missing: str) -> None:
    metadata = {"deltastore": calibration.VERSION, "fingerprint": "abc", "formats": "{}", "checksum": "0"}
    del metadata[missing]
    save_file(tensors_of(0), tmp_path / "c.safetensors", metadata)
    with pytest.raises(CalibrationError, match=f"its metadata has no {missing}"):
        load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("missing", ["layers.1.shaping", "layers.0.mean"])
def test_a_missing_tensor_is_refused(tmp_path: Path, missing: str) -> None:
    tensors = {**tensors_of(0), **tensors_of(1)}
    tensors[missing + ".other"] = tensors.pop(missing)
    with pytest.raises(CalibrationError, match=missing):
        load(write(tmp_path / "c.safetensors", tensors))


def test_flipped_bytes_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made("abc").save(path)
    whole = path.read_bytes()
    for position in (len(whole) - 1, len(whole) // 2, len(whole) * 3 // 4):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CalibrationError, match="damaged"):
            load(path)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match="cannot be read"):
            load(path)


def test_a_basis_that_is_not_contiguous_is_refused() -> None:
    (layer, *_) = made("abc").layers
    turned = KeyBasis(layer.mean, layer.rotation.transpose(1, 2), layer.query_rotation, layer.shaping)
    with pytest.raises(CalibrationError, match="contiguous False"):
        Calibration("abc", (turned,), {})


def test_the_files_of_a_name_on_the_hub_are_those_of_its_revision(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        model_folder_of_commit = repository / "snapshots" / commit
        model_folder_of_commit.mkdir(parents=True)
        (model_folder_of_commit / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    assert local_folder("org/name", None, str(tmp_path)) == repository / "snapshots" / ("a" * 40)
    assert local_folder("org/name", "v2", str(tmp_path)) == repository / "snapshots" / ("b" * 40)
    assert local_folder("org/name", "v3", str(tmp_path)) is None
    assert local_folder(str(tmp_path), "v2", None) == tmp_path


def test_a_tiers_formats_are_those_dealt_out_or_its_calibrated_one() -> None:
    dealt = (Format(4, 4), Format(3, 3), Format(2, 2))
    calibration_ = replace(made("abc"), formats={"lossless": dealt})
    assert calibration_.formats_of(TIERS["lossless"]) == dealt
    assert calibration_.formats_of(TIERS["k4v2"]) == (Format(3, 3),) * 3
    assert calibration_.formats_of(TIERS["conservative"]) == (Format(3, 2),) * 3
