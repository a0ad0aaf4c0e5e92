"""A configuration that does not fit its weights: SGLang 0.5.23 cuts larger tensors to size, and serves noise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .refusals import Refused

_KEYS = re.compile(r"(^|\.)layers\.\d+\.self_attn\.k_proj\.weight$")
_OTHER_TOWERS = re.compile(r"vis|audio|encoder|tower")
_PLAIN = ("F32", "F16", "BF16")


def check_key_rows(folder: Path, kv_heads: int, head_dim: int) -> None:
    """Raises Refused where no layer's keys have the configuration's rows. Layers may differ in their heads; weights
    that are packed, or have other names, say nothing."""
    found = set()
    for rows in _key_rows(folder):
        if rows == kv_heads * head_dim:
            return
        found.add(rows)
    if found:
        raise Refused(
            f"--kv-compress deltastore: the weights have k_proj of {sorted(found)} rows; allowed is "
            f"{kv_heads * head_dim}, for the {kv_heads} KV heads of head_dim {head_dim} that config.json names; SGLang "
            "would cut them: correct config.json"
        )


def _key_rows(folder: Path) -> Iterator[int]:
    """From the headers alone, one tensor after the other."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no dict)
                    if _KEYS.search(name) and not _OTHER_TOWERS.search(name):
                        keys = tensors.get_slice(name)
                        if keys.get_dtype() in _PLAIN:
                            yield keys.get_shape()[0]
        except (OSError, SafetensorError):
            return  # SGLang says best what is wrong with a file
