"""Bytes of a model's weights, from the network as transformers builds it and its checkpoint's quantization_config.

A quantized checkpoint packs the matrices of linear layers and of experts. Embeddings, the output head, norms and what
the configuration excludes stay in 16 bits.
"""

from __future__ import annotations

import re
from typing import Any

import torch

PLAIN_BITS = 16
_SKIP_FIELDS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
_NEVER_PACKED = ("lm_head", "embed_tokens")
_MODELOPT_BITS = {"FP8": 8.0, "NVFP4": 4 + 8 / 16}  # NVFP4: one byte of scale for 16 values


def weights_bytes(network: torch.nn.Module, quantization: dict[str, Any] | None) -> float:
    """Of all parameters, a shared one once. Raises ValueError for a quantization that is not known."""
    if not quantization:
        return sum(parameter.numel() for parameter in network.parameters()) * PLAIN_BITS / 8
    packed_bits, skipped = _packed_bits(quantization), _skipped(quantization)
    experts_only = quantization["quant_method"] == "mxfp4"
    total_bits = 0.0
    for name, parameter in network.named_parameters():
        packed = _is_packed(network, name, parameter, experts_only) and not any(skip(name) for skip in skipped)
        total_bits += parameter.numel() * (packed_bits if packed else PLAIN_BITS)
    return total_bits / 8


def _is_packed(network: torch.nn.Module, name: str, parameter: torch.nn.Parameter, experts_only: bool) -> bool:
    owner, _, leaf = name.rpartition(".")
    if any(part in _NEVER_PACKED for part in name.split(".")):
        return False
    if "experts" in name and parameter.dim() == 3:  # all experts' matrices in one tensor
        return True
    return not experts_only and leaf == "weight" and isinstance(network.get_submodule(owner), torch.nn.Linear)


def _skipped(quantization: dict[str, Any]) -> list[Any]:
    """Predicates of parameter names: what the configuration leaves in 16 bits."""
    entries = [entry for field in _SKIP_FIELDS for entry in quantization.get(field) or ()]
    return [re.compile(_pattern(entry)).match for entry in entries]


def _pattern(entry: str) -> str:
    """Of a `re:` pattern, or of a module's name or a part of it, in which * stands for anything."""
    if entry.startswith("re:"):
        return entry.removeprefix("re:")
    anything = ".*".join(re.escape(part) for part in entry.split("*"))
    return rf"(.*\.)?{anything}\."


def _packed_bits(quantization: dict[str, Any]) -> float:
    """Bits of a packed weight, scales and zero points included."""
    method = quantization.get("quant_method")
    if method in ("awq", "gptq", "auto-round"):
        return _grouped(quantization.get("bits"), quantization.get("group_size"), zero_points=True)
    if method in ("fp8", "fbgemm_fp8"):
        return 8.0
    if method == "mxfp4":
        return 4 + 8 / 32  # one byte of scale for 32 values
    if method == "bitsandbytes":
        return 8.0 if quantization.get("load_in_8bit") else 4 + 32 / 64  # one float32 of scale for 64 values
    if method == "modelopt" and (algorithm := quantization.get("quant_algo")) in _MODELOPT_BITS:
        return _MODELOPT_BITS[algorithm]
    if method == "compressed-tensors":
        return _compressed_tensors_bits(quantization)
    algorithm = quantization.get("quant_algo")
    raise ValueError(
        f"quantization_config has quant_method {method!r}" + (f" with quant_algo {algorithm!r}" if algorithm else "")
        + ": known are awq, gptq, auto-round, fp8, fbgemm_fp8, mxfp4, bitsandbytes, compressed-tensors, and modelopt "
        f"with {', '.join(_MODELOPT_BITS)}"
    )  # fmt: skip


def _compressed_tensors_bits(quantization: dict[str, Any]) -> float:
    groups = (quantization.get("config_groups") or {}).values()
    found = {
        _grouped(weights.get("num_bits"), weights.get("group_size"), zero_points=not weights.get("symmetric", True))
        for weights in (group.get("weights") or {} for group in groups)
    }
    if len(found) != 1:
        raise ValueError(f"quantization_config has {len(found)} kinds of weights in config_groups: 1 is understood")
    return found.pop()


def _grouped(bits: Any, group_size: Any, zero_points: bool) -> float:
    """Each group of weights has a 16-bit scale, and a zero point of as many bits as a weight."""
    if type(bits) is not int or not 1 <= bits <= PLAIN_BITS:
        raise ValueError(f"quantization_config says that a weight has {bits!r} bits: 1 to {PLAIN_BITS} are understood")
    if group_size in (None, -1):  # a whole channel: too long to matter
        return float(bits)
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"quantization_config says group_size {group_size!r}: at least 1, or -1 is understood")
    return bits + (PLAIN_BITS + bits * zero_points) / group_size
