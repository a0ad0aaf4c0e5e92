"""What `deltastore doctor` says of a model's folder and of the machine, without starting anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format
from sglang_deltastore.policy.calibration import Calibration, cached_path, fingerprint
from sglang_deltastore.seam import doctor


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with a configuration alone, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    return tmp_path


def test_a_folder_without_a_tokenizer_is_not_well(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    finding = doctor._tokenizer(str(folder))
    assert not finding.well
    assert "cannot be loaded" in finding.found and "--skip-tokenizer-init" in finding.advice


def test_a_folder_with_a_tokenizer_is_well(smollm2: Path) -> None:
    finding = doctor._tokenizer(str(smollm2))
    assert finding.well and "49,152 tokens" in finding.found


@pytest.mark.parametrize(
    ("gpu", "flags", "advice"),
    [(False, {"avx2"}, "serve with --dtype float32"), (False, {"amx_bf16"}, ""), (True, {"avx2"}, "")],
)
def test_a_cpu_without_bfloat16_is_named(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, flags: set[str], advice: str
) -> None:
    monkeypatch.setattr(doctor, "needs_cpu_engine", lambda: not gpu)
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset(flags))
    assert doctor._dtype().advice == advice


def test_a_calibration_is_named_with_what_to_do(folder: Path) -> None:
    finding = doctor._calibration(str(folder))
    assert (finding.found, finding.advice) == ("none for this model yet", "its first server will make one")
    basis = KeyBasis(*(torch.zeros(shape) for shape in ((2, 32), *[(2, 32, 32)] * 3)))
    name = fingerprint(folder)
    made = Calibration(name, (basis,), {})
    made.save(cached_path(name))
    assert doctor._calibration(str(folder)) == doctor.Finding("calibration", True, "1 layers, one format for all")
    replace(made, formats={"k4v2": (Format(4, 2),)}).save(cached_path(name))
    finding = doctor._calibration(str(folder))
    assert finding.found == "1 layers; bits dealt out by layer: k4v2"
    assert "lose by that" in finding.advice
