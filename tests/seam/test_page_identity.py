"""Whatever the bytes of a page follow from names the pages of a storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltastore_kernels import ops
from deltastore_kernels.basis import fit_key_basis
from deltastore_kernels.layout import Format, PageLayout
from sglang_deltastore.policy.calibration import Calibration
from sglang_deltastore.policy.config import Settings
from sglang_deltastore.policy.refusals import Refused
from sglang_deltastore.seam import deployment
from sglang_deltastore.seam.deployment import Deployment, page_identity

HEADS, DIM = 2, 32
LAYOUT = PageLayout(Format(4, 3), HEADS, DIM, 16)


def calibrated(mean: float) -> Calibration:
    moment = torch.eye(DIM).expand(HEADS, -1, -1)
    return Calibration("of a model", (fit_key_basis(torch.full((HEADS, DIM), mean), moment, moment),), {})


class Server:
    """One rank's, as far as its pages are named by it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
        (folder / "model.safetensors").write_bytes(b"weights")
        self.folder = folder
        self.args = SimpleNamespace(
            model_path=str(folder), revision=None, download_dir=None, json_model_override_args="{}", load_format="auto",
            quantization=None,
        )  # fmt: skip
        self.dtype = torch.bfloat16
        self.rank, self.ranks = 0, 1
        self.deployment = Deployment(
            Settings(mode="deltastore"), calibrated(1), "", (0,), (LAYOUT,), (None,), (1.0,), ops.load("reference"), 512
        )

    def identity(self, monkeypatch: pytest.MonkeyPatch) -> str:
        parallel = SimpleNamespace(attn_tp_rank=self.rank, attn_tp_size=self.ranks)
        monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: parallel)
        kvc: Any = SimpleNamespace(server_args=self.args, model_config=SimpleNamespace(dtype=self.dtype))
        return page_identity(kvc, self.deployment)

    def deploy(self, **changes: Any) -> None:
        self.deployment = replace(self.deployment, **changes)


CHANGES: dict[str, Callable[[Server], Any]] = {
    "tier": lambda server: server.deploy(settings=Settings(mode="deltastore", tier_name="k4v2")),
    "bits of a layer": lambda server: server.deploy(layouts=(replace(LAYOUT, format=Format(3, 4)),)),
    "page size": lambda server: server.deploy(layouts=(replace(LAYOUT, page_tokens=32),)),
    "another calibration": lambda server: server.deploy(calibration=calibrated(2)),
    "no calibration": lambda server: server.deploy(calibration=None),
    "weights": lambda server: (server.folder / "model.safetensors").write_bytes(b"Weights"),
    "configuration": lambda server: setattr(server.args, "json_model_override_args", '{"rope_theta": 5}'),
    "quantization": lambda server: setattr(server.args, "quantization", "fp8"),
    "dtype": lambda server: setattr(server, "dtype", torch.float32),
    "rank": lambda server: setattr(server, "rank", 1),
    "ranks": lambda server: setattr(server, "ranks", 2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_another_for(change: Callable[[Server], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path / "model")
    before = server.identity(monkeypatch)
    change(server)
    assert server.identity(monkeypatch) != before


def test_it_is_another_for_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path / "model")
    before = server.identity(monkeypatch)
    monkeypatch.setattr(deployment, "VERSION", deployment.VERSION + 1)
    assert server.identity(monkeypatch) != before


def test_it_is_the_same_wherever_the_model_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Server(tmp_path / "one"), Server(tmp_path / "other")
    other.deploy(kernels=ops.load("cpu"), calibration_source="elsewhere")
    assert one.identity(monkeypatch) == other.identity(monkeypatch)


def test_a_model_whose_files_are_elsewhere_gets_no_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path / "model")
    server.args.model_path = "nobody/has-downloaded-this"
    with pytest.raises(Refused, match="--model-path nobody/has-downloaded-this: allowed is a model whose files"):
        server.identity(monkeypatch)
