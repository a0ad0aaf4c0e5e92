"""Weights that a configuration does not describe are seen before SGLang cuts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_deltastore.policy.refusals import Refused
from sglang_deltastore.policy.weight_rules import check_key_rows

LAYER = "model.layers.{}.self_attn.k_proj.weight"


def save(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_a_head_dim_that_no_layer_has_is_refused(tmp_path: Path) -> None:
    save(tmp_path, **{LAYER.format(layer): torch.zeros(128, 8) for layer in range(2)})
    check_key_rows(tmp_path, kv_heads=2, head_dim=64)
    with pytest.raises(Refused, match=r"k_proj of \[128\] rows; allowed is 64, for the 2 KV heads of head_dim 32"):
        check_key_rows(tmp_path, kv_heads=2, head_dim=32)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(128, 8)},
        {"vision_tower.layers.0.self_attn.k_proj.weight": torch.zeros(128, 8)},
        {LAYER.format(0): torch.zeros(128, 8, dtype=torch.uint8)},
        {LAYER.format(0): torch.zeros(128, 8), LAYER.format(1): torch.zeros(64, 8)},
    ],
    ids=["no files", "one projection", "another tower", "packed", "layers that differ"],
)
def test_what_says_nothing_is_let_through(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if tensors:
        save(tmp_path, **tensors)
    check_key_rows(tmp_path, kv_heads=2, head_dim=32)


def test_a_broken_file_is_for_sglang_to_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    check_key_rows(tmp_path, kv_heads=2, head_dim=32)
