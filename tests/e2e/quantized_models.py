"""Copies of a model of rounded weights, as SGLang reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

GROUP = 64
"""Inputs that share a scale and a zero point."""


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator)
                yield name, file.get_tensor(name)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [out, in] -> levels [out, in / GROUP, GROUP] and zero points, 0 to 15, and scales [out, in / GROUP]."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / 15).half().float().clamp_min(1e-6)
    zeros = (-low / scales).round().clamp(0, 15)
    return (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15), zeros, scales


def gguf_copy(model: Path, folder: Path) -> Path:
    """A GGUF file of 16-bit floats, of weights that have been rounded to 4 bits; its configuration lies beside it."""
    _copy_others(model, folder)
    shutil.copy(model / "config.json", folder)
    config = json.loads((model / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, weight in tensors(model):
        stem = names.get_name(name.removesuffix(".weight"))
        if is_linear(name):
            levels, zeros, scales = rounded(weight.float())
            weight = ((levels - zeros[..., None]) * scales[..., None]).flatten(1)  # noqa: PLW2901 (the same, rounded)
        # Vectors in float32, as GGUF wants them.
        writer.add_tensor(f"{stem}.weight", (weight.half() if weight.ndim > 1 else weight.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def _copy_others(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name:
            shutil.copy(path, folder)
