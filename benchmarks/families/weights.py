"""A family's folder, as SGLang loads it: configuration, random weights; a tokenizer only where there are images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .shapes import Family

_VECTOR_NOISE, _SINK_SPREAD = 0.1, 1.0


def save(family: Family, folder: Path) -> Path:
    """Writes it and returns the folder."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.config_fields())
    model = getattr(transformers, family.auto_class).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter)
    model.save_pretrained(folder)
    _add(folder / "config.json", family.also)
    if family.processor:
        family.processor.save(folder, family.towers["vision_config"]["patch_size"])
    return folder


def _fill(name: str, parameter: nn.Parameter) -> None:
    """Random weights with which every layer changes the numbers as much as it found, so that the context matters to
    every log-probability."""
    if "sink" in name:
        parameter.normal_(std=_SINK_SPREAD)
    elif parameter.dim() > 1:
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    else:
        parameter.add_(torch.randn_like(parameter), alpha=_VECTOR_NOISE)


def _add(config_json: Path, fields: dict[str, Any]) -> None:
    written = json.loads(config_json.read_text())
    config_json.write_text(json.dumps(written | fields, indent=1))
