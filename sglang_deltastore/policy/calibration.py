"""What `deltastore calibrate` learned about a model: one safetensors file, small beside the model.

    layers.<l>.<tensor of KeyBasis>    each attention layer's key basis, float32
    metadata                           version, fingerprint of the model, each tier's formats by layer, and a checksum
                                       of all that

What a file says goes to compiled kernels as it is, so whatever is wrong with it is found here.
`resolve` is what `--kv-compress-calibration` means: a file, `none`, or `auto`, the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltastore_kernels.basis import KeyBasis
from deltastore_kernels.layout import Format

from ..cache_folder import cache_folder
from .tiers import Tier

logger = logging.getLogger(__name__)

VERSION = "4"
AUTO, NONE = "auto", "none"

_SAMPLE_BYTES = 1 << 12
_SAMPLES_PER_FILE = 256
"""So close together that a layer trained anew does not lie between two of them."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: what tools rewrite in config.json without changing the model
_INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_SUMMED = ("deltastore", "fingerprint", "formats")
_REMEDY = "make one: deltastore calibrate"
_TENSORS = tuple(field.name for field in fields(KeyBasis))


class CalibrationError(ValueError):
    """A calibration that cannot be used: what it is, what is allowed, what to do."""


@dataclass(frozen=True)
class Calibration:
    """One model's calibration; `formats` by tier name, one for each layer."""

    fingerprint: str
    layers: tuple[KeyBasis, ...]
    formats: dict[str, tuple[Format, ...]]

    def __post_init__(self) -> None:
        """Raises CalibrationError for a layer's tensors that are not of one shape, float32, contiguous and finite, and
        for formats of another number of layers."""
        for index, layer in enumerate(self.layers):
            _check_layer(f"layers.{index}", layer)
        for tier, by_layer in self.formats.items():
            if len(by_layer) != len(self.layers):
                raise CalibrationError(
                    f"the calibration's formats for tier {tier} are of {len(by_layer)} layers; allowed is "
                    f"{len(self.layers)}, as many as it has; {_REMEDY}"
                )

    def check_shape(self, expected: list[tuple[int, int]]) -> None:
        """Raises CalibrationError when the layers are not those of the model: of each its KV heads, and their keys'
        dims."""
        found = [tuple(layer.mean.shape) for layer in self.layers]
        if found != expected:
            raise CalibrationError(
                f"the calibration has {len(found)} layers of (KV heads, head_dim) {sorted(set(found))}; the model has "
                f"{len(expected)} of {sorted(set(expected))}; make one for this model: deltastore calibrate --model"
            )

    def formats_of(self, tier: Tier) -> tuple[Format, ...]:
        """A tier's formats by layer where this calibration is in force."""
        return self.formats.get(tier.name) or (tier.calibrated or tier.format,) * len(self.layers)

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

    def without_means(self, capped: Sequence[bool]) -> Calibration:
        """The same for layers of which these cap their scores: what a mean adds to a score goes through the cap with
        it, so keys are stored with their means there (as `Moments.fit` has it; older files say otherwise)."""
        layers = (
            replace(layer, mean=torch.zeros_like(layer.mean)) if cap else layer
            for layer, cap in zip(self.layers, capped, strict=True)
        )
        return replace(self, layers=tuple(layers))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors, metadata = self._contents()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file(tensors, partial, {**metadata, "checksum": _checksum(tensors, metadata)})
        partial.replace(path)

    @property
    def checksum(self) -> str:
        """Hexadecimal, of all that it says."""
        return _checksum(*self._contents())

    def _contents(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors = {
            f"layers.{index}.{name}": getattr(layer, name).cpu()
            for index, layer in enumerate(self.layers)
            for name in _TENSORS
        }
        formats = {
            tier: [[fmt.key_bits, fmt.value_bits] for fmt in by_layer] for tier, by_layer in self.formats.items()
        }
        return tensors, {"deltastore": VERSION, "fingerprint": self.fingerprint, "formats": json.dumps(formats)}


def _check_layer(where: str, layer: KeyBasis) -> None:
    if layer.mean.ndim != 2:
        raise CalibrationError(
            f"{where}.mean of the calibration has shape {tuple(layer.mean.shape)}; allowed is (KV heads, head_dim); "
            f"{_REMEDY}"
        )
    heads, head_dim = layer.mean.shape
    for name in _TENSORS:
        tensor = getattr(layer, name)
        expected = (heads, head_dim) if name == "mean" else (heads, head_dim, head_dim)
        found = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())
        if found != (expected, torch.float32, True):
            raise CalibrationError(
                f"{where}.{name} of the calibration has shape {found[0]}, {found[1]}, contiguous {found[2]}; "
                f"allowed is {expected}, torch.float32, contiguous; {_REMEDY}"
            )
        if not tensor.isfinite().all():
            raise CalibrationError(f"{where}.{name} of the calibration has values that are not finite; {_REMEDY}")


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Hexadecimal, of names, bytes, and metadata but the checksum itself."""
    digest = hashlib.sha256(json.dumps({key: metadata[key] for key in _SUMMED}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: Path) -> Calibration:
    """Read a file. Raises CalibrationError when it is missing, broken, damaged, or not a calibration."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
    if metadata.get("deltastore") != VERSION:
        raise CalibrationError(
            f"{path}: not a calibration of version {VERSION} (found {metadata.get('deltastore')}); {_REMEDY}"
        )
    if missing := [key for key in (*_SUMMED, "checksum") if key not in metadata]:
        raise CalibrationError(f"{path}: its metadata has no {', '.join(missing)}; allowed is a whole file; {_REMEDY}")
    if _checksum(tensors, metadata) != metadata["checksum"]:
        raise CalibrationError(f"{path}: damaged, its contents are not those of its checksum; {_REMEDY}")
    try:
        return _parsed(tensors, metadata)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise CalibrationError(f"{path}: not what deltastore calibrate writes ({error!r}); {_REMEDY}") from error


def _parsed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Calibration:
    count = len(tensors) // len(_TENSORS)
    layers = tuple(KeyBasis(**{name: tensors[f"layers.{index}.{name}"] for name in _TENSORS}) for index in range(count))
    formats = {tier: tuple(Format(*bits) for bits in rows) for tier, rows in json.loads(metadata["formats"]).items()}
    return Calibration(metadata["fingerprint"], layers, formats)


def weight_files(model_folder: Path) -> list[Path]:
    return sorted(path for pattern in _WEIGHTS for path in model_folder.glob(pattern))


def fingerprint(model: Path, overrides: Mapping[str, Any] | None = None) -> str:
    """Hexadecimal name of a model: its configuration, with what --json-model-override-args changes in it, and samples
    of its weight files. model: its folder, or a GGUF file, whose configuration lies beside it or within.

    Not in it is what leaves keys and queries what they are but for rounding: --dtype, when files were written, and
    quantization at load (`cached_path`).
    """
    is_file = model.is_file()
    config_file = (model.parent if is_file else model) / "config.json"
    try:
        config = {} if is_file and not config_file.exists() else json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{model}: no model folder with a config.json ({error})") from error
    own = {name: value for name, value in {**config, **(overrides or {})}.items() if name not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for path in [model] if is_file else weight_files(model):
        _add_sample(digest, path)
    return digest.hexdigest()[:32]


def _add_sample(digest: Any, path: Path) -> None:
    size_bytes = path.stat().st_size
    digest.update(f"{path.name} {size_bytes}".encode())
    with path.open("rb") as file:
        for sample in range(_SAMPLES_PER_FILE):
            file.seek(size_bytes * sample // _SAMPLES_PER_FILE)
            digest.update(file.read(_SAMPLE_BYTES))


def cached_path(model_fingerprint: str, text_name: str | None = None, loaded_as: str | None = None) -> Path:
    """Where `auto` looks, and where a server and `deltastore calibrate` write unless told otherwise. text_name: of the
    text that the server was told to calibrate on; None: any. loaded_as: what the server makes of the weights while it
    loads them (--quantization); None: they stay what the files say."""
    name = "-".join(part for part in (model_fingerprint, text_name, loaded_as) if part)
    return cache_folder() / "calibrations" / f"{name}.safetensors"


def cached(path: Path) -> Calibration | None:
    """What the user's cache has there. A file of another version, or a damaged one, counts as none: it was made by
    itself, and is made anew in the same way."""
    if not path.exists():
        return None
    try:
        return load(path)
    except CalibrationError as error:
        logger.warning("DeltaStore: the calibration in the user's cache is not used: %s", error)
        return None


def resolve(setting: str, model_folder: Path | None, overrides: Mapping[str, Any] | None = None) -> Calibration | None:
    """What `--kv-compress-calibration SETTING` means for a model; None: serve without.

    Raises CalibrationError for a file that is missing, broken or of another model. model_folder None: the
    model's files are not at hand, and no calibration can be told to be the model's. overrides: see `fingerprint`.
    """
    if setting == NONE or (setting == AUTO and model_folder is None):
        return None
    if model_folder is None:
        raise CalibrationError(
            f"--kv-compress-calibration {setting}: the model's folder is not on this machine, so the file cannot be "
            "told to be this model's; give --model-path as a folder"
        )
    own = fingerprint(model_folder, overrides)
    if setting == AUTO:
        return cached(cached_path(own))
    calibration = load(Path(setting))
    if calibration.fingerprint != own:
        raise CalibrationError(
            f"--kv-compress-calibration {setting}: made for a model with fingerprint {calibration.fingerprint}; "
            f"{model_folder} has {own}; make one for it: deltastore calibrate --model {model_folder}"
        )
    return calibration
