"""What this process serves with: settings, calibration, layouts, kernels, windows; found out once, when the model has
been loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltastore_kernels.layout import PageLayout
from deltastore_kernels.ops import Operations

from ..policy.calibration import Calibration, resolve, source
from ..policy.config import Settings
from ..policy.kernels import choose_kernels
from ..policy.layer_rules import check_layers
from ..store.size import StoreSize
from .flags import settings_of

_ATTRIBUTE = "_deltastore_deployment"
"""Rides on SGLang's KVCacheConfigurator, of which a process has one for each model."""


@dataclass(frozen=True)
class Deployment:
    """One rank's part of a server. Of each layer, in the order of layer_id: its page layout, and its window (None: it
    has none). `calibration` is this rank's; context_tokens: of the longest context."""

    settings: Settings
    calibration: Calibration | None
    layouts: tuple[PageLayout, ...]
    windows: tuple[int | None, ...]
    kernels: Operations
    context_tokens: int

    def store_size(self, num_frames: int) -> StoreSize:
        scratch_bytes = self.kernels.scratch_bytes(self.layouts, self.context_tokens)
        return StoreSize(self.layouts, num_frames, self.context_tokens, scratch_bytes)


def deployment_of(kvc: Any) -> Deployment:
    """For the model that `kvc` has loaded. Raises Refused for a model that we cannot serve, CalibrationError for a
    calibration that is not this model's."""
    if (known := getattr(kvc, _ATTRIBUTE, None)) is None:
        known = _deploy(kvc)
        setattr(kvc, _ATTRIBUTE, known)
    return known


def _deploy(kvc: Any) -> Deployment:
    settings = settings_of(kvc.server_args)
    layers = attention_layers(kvc.model)
    check_layers(layers, kvc.model)
    heads, head_dim = [layer.tp_k_head_num for layer in layers], layers[0].head_dim
    calibration = _rank_calibration(kvc.server_args)
    if calibration:
        calibration.check_shape(heads, head_dim)
    formats = calibration.formats.get(settings.tier_name) if calibration else None
    layouts = tuple(settings.tier.layouts(heads, head_dim, kvc.pool_page_size, formats))
    return Deployment(
        settings=settings,
        calibration=calibration,
        layouts=layouts,
        windows=tuple(window_of(layer) for layer in layers),
        # Chosen once: it may build modules, and says in the log what it chose.
        kernels=choose_kernels(settings.kernels, kvc.device, layouts),
        context_tokens=kvc.model_config.context_len,
    )


def attention_layers(model: Any) -> list[Any]:
    """The model's RadixAttention layers by layer_id."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    return sorted(layers, key=lambda layer: layer.layer_id)


def window_of(layer: Any) -> int | None:
    """Tokens before the query that a layer's window lets it see, as SGLang and we count them; None: all."""
    window = layer.sliding_window_size
    return window if window is not None and window >= 0 else None


def calibration_of(server_args: Any) -> Calibration | None:
    """The calibration of the server's model, for all its heads; None: serve without. Raises CalibrationError."""
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


def _rank_calibration(server_args: Any) -> Calibration | None:
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
