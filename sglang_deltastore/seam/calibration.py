"""The calibration that a server was asked to use."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ..calibration import Calibration, resolve, source
from .flags import settings_of


def calibration_of(server_args: Any) -> Calibration | None:
    """The calibration of the server's model; None: serve without. Raises CalibrationError."""
    settings = settings_of(server_args)
    if settings.tier.format.is_raw:
        return None
    return _resolve(settings.calibration, server_args.model_path, server_args.revision, server_args.download_dir)


def calibration_source(server_args: Any) -> str:
    """In words: the file, or why there is none."""
    settings = settings_of(server_args)
    if settings.tier.format.is_raw:
        return "none, because raw keeps floats"
    folder = local_folder(server_args.model_path, server_args.revision, server_args.download_dir)
    return source(settings.calibration, folder)


def rank_calibration(server_args: Any) -> Calibration | None:
    """The part of it for the KV heads of this process, once SGLang has laid out its ranks."""
    calibration = calibration_of(server_args)
    if calibration is None:
        return None
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return calibration.of_rank(parallel.attn_tp_rank, parallel.attn_tp_size)


@lru_cache(maxsize=2)
def _resolve(setting: str, model_path: str, revision: str | None, download_dir: str | None) -> Calibration | None:
    return resolve(setting, local_folder(model_path, revision, download_dir))


def local_folder(model_path: str, revision: str | None, download_dir: str | None) -> Path | None:
    """The model's files on this machine; a name on the Hub whose revision is not there yet has none."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_path, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
