"""What `deltastore calibrate` learned about a model: one safetensors file, small beside the model.

    layers.<l>.<tensor of KeyBasis>    each attention layer's key basis
    metadata                           version, fingerprint of the model, and each tier's formats by layer

`resolve` is what `--kv-compress-calibration` means: a file, `none`, or `auto`, the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format

from .cache_folder import cache_folder

VERSION = "1"
AUTO, NONE = "auto", "none"

_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 16
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
#: what tools rewrite in config.json without changing the model
_INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_TENSORS = tuple(field.name for field in fields(KeyBasis))


class CalibrationError(ValueError):
    """A calibration that cannot be used: what it is, what is allowed, what to do."""


@dataclass(frozen=True)
class Calibration:
    """One model's calibration; `formats` by tier name, one for each layer."""

    fingerprint: str
    layers: tuple[KeyBasis, ...]
    formats: dict[str, tuple[Format, ...]]

    def check_shape(self, heads_by_layer: list[int], head_dim: int) -> None:
        """Raises CalibrationError when the layers are not those of the model."""
        found = [tuple(layer.mean.shape) for layer in self.layers]
        expected = [(heads, head_dim) for heads in heads_by_layer]
        if found != expected:
            raise CalibrationError(
                f"the calibration has {len(found)} layers of (KV heads, head_dim) {sorted(set(found))}; the model has "
                f"{len(expected)} of {sorted(set(expected))}; make one for this model: deltastore calibrate --model"
            )

    def of_rank(self, rank: int, ranks: int) -> Calibration:
        """What one of a tensor-parallel server's ranks needs: its KV heads' bases. With more ranks than KV heads, as
        many ranks in a row have the same head, as in SGLang."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            heads = len(tensor)
            if ranks > heads:
                first = rank // (ranks // heads)
                return tensor[first : first + 1]
            return tensor[rank * heads // ranks : (rank + 1) * heads // ranks]

        layers = (KeyBasis(**{name: own(getattr(layer, name)) for name in _TENSORS}) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {
            f"layers.{index}.{name}": getattr(layer, name).cpu()
            for index, layer in enumerate(self.layers)
            for name in _TENSORS
        }
        formats = {
            tier: [[fmt.key_bits, fmt.value_bits] for fmt in by_layer] for tier, by_layer in self.formats.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file(
            tensors,
            partial,
            {"deltastore": VERSION, "fingerprint": self.fingerprint, "formats": json.dumps(formats)},
        )
        partial.replace(path)


def load(path: Path) -> Calibration:
    """Read a file. Raises CalibrationError when it is missing, broken, or not a calibration."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("deltastore") != VERSION:
                raise CalibrationError(
                    f"{path}: not a calibration of version {VERSION} (found {metadata.get('deltastore')}); "
                    "make one: deltastore calibrate"
                )
            count = len({name.split(".")[1] for name in file.keys()})  # noqa: SIM118 (no iterator)
            layers = tuple(
                KeyBasis(**{name: file.get_tensor(f"layers.{index}.{name}") for name in _TENSORS})
                for index in range(count)
            )
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: cannot be read ({error}); make one: deltastore calibrate") from error
    formats = {tier: tuple(Format(*bits) for bits in rows) for tier, rows in json.loads(metadata["formats"]).items()}
    return Calibration(metadata["fingerprint"], layers, formats)


def fingerprint(model_folder: Path) -> str:
    """Hexadecimal name of a model: its configuration, and samples of its weight files."""
    try:
        config = json.loads((model_folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model_folder}: no model folder with a config.json ({error})") from error
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in config.items() if k not in _INCIDENTAL}, sort_keys=True).encode()
    )
    for path in sorted(path for pattern in _WEIGHTS for path in model_folder.glob(pattern)):
        size_bytes = path.stat().st_size
        digest.update(f"{path.name} {size_bytes}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES_PER_FILE):
                file.seek(size_bytes * sample // _SAMPLES_PER_FILE)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def cached_path(model_fingerprint: str) -> Path:
    """Where `auto` looks, and where `deltastore calibrate` writes unless told otherwise."""
    return cache_folder() / "calibrations" / f"{model_fingerprint}.safetensors"


def resolve(setting: str, model_folder: Path | None) -> Calibration | None:
    """What `--kv-compress-calibration SETTING` means for a model; None: serve without.

    Raises CalibrationError for a file that is missing, broken or of another model. model_folder None: the
    model's files are not at hand, and no calibration can be told to be the model's.
    """
    if setting == NONE or (setting == AUTO and model_folder is None):
        return None
    if model_folder is None:
        raise CalibrationError(
            f"--kv-compress-calibration {setting}: the model's folder is not on this machine, so the file cannot be "
            "told to be this model's; give --model-path as a folder"
        )
    own = fingerprint(model_folder)
    if setting == AUTO:
        return load(cached_path(own)) if cached_path(own).exists() else None
    calibration = load(Path(setting))
    if calibration.fingerprint != own:
        raise CalibrationError(
            f"--kv-compress-calibration {setting}: made for a model with fingerprint {calibration.fingerprint}; "
            f"{model_folder} has {own}; make one for it: deltastore calibrate --model {model_folder}"
        )
    return calibration
