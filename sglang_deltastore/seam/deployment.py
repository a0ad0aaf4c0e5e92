"""What this process serves with: settings, calibration, layouts, kernels, windows; found out once, when the model has
been loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from deltastore_kernels import ops
from deltastore_kernels.layout import PageLayout
from deltastore_kernels.ops import Operations

from ..policy import calibration_text
from ..policy.calibration import AUTO, NONE, Calibration, cached_path, fingerprint, load, resolve, weight_files
from ..policy.config import Settings
from ..policy.kernels import choose_kernels
from ..policy.layer_rules import check_layers, check_windows
from ..policy.refusals import Refused
from ..policy.tiers import TIERS, Tier
from ..policy.weight_rules import check_key_rows
from ..store.sealed_page import VERSION
from ..store.size import StoreSize
from .drafts import draft_pool_token_bytes
from .flags import settings_of
from .scoring import window_of

_DEPLOYED: WeakKeyDictionary[Any, Deployment] = WeakKeyDictionary()
"""Of each model that this process has loaded."""


@dataclass(frozen=True)
class Deployment:
    """One rank's part of a server. Of each layer with a KV cache, in the order of layer_id: that, its page layout, its
    window (None: it has none), stock_shares and window_layers (see StoreSize). `calibration` is this rank's,
    `calibration_source` says where it comes from or why there is none; context_tokens: of the longest context;
    draft_tokens, draft_pool_token_bytes, fine_layouts: see StoreSize."""

    settings: Settings
    calibration: Calibration | None
    calibration_source: str
    layer_ids: tuple[int, ...]
    layouts: tuple[PageLayout, ...]
    windows: tuple[int | None, ...]
    stock_shares: tuple[float, ...]
    kernels: Operations
    context_tokens: int
    window_layers: tuple[bool, ...] = ()
    window_share: float = 1.0
    draft_tokens: int = 0
    fine_layouts: tuple[PageLayout, ...] = ()
    draft_pool_token_bytes: int = 0

    def store_size(self, num_frames: int) -> StoreSize:
        scratch_bytes = self.kernels.scratch_bytes(self.layouts, self.context_tokens)
        return StoreSize(
            self.layouts,
            num_frames,
            self.context_tokens,
            scratch_bytes,
            window_layers=self.window_layers,
            window_share=self.window_share,
            stock_shares=self.stock_shares,
            draft_tokens=self.draft_tokens,
            fine_layouts=self.fine_layouts,
            draft_pool_token_bytes=self.draft_pool_token_bytes,
        )


def deployment_of(kvc: Any) -> Deployment:
    """For the model that `kvc` has loaded. Raises Refused for a model that we cannot serve, CalibrationError for a
    calibration that is not this model's."""
    if kvc.model not in _DEPLOYED:
        _DEPLOYED[kvc.model] = _deploy(kvc)
    return _DEPLOYED[kvc.model]


def _deploy(kvc: Any) -> Deployment:
    settings = settings_of(kvc.server_args)
    layers = attention_layers(kvc.model)
    check_layers(layers, kvc.model, _cached_layers(kvc))
    window_layers = _window_layers(kvc, layers)
    calibration, source = _calibration(kvc, layers, settings)
    if calibration:
        calibration.check_shape([(layer.tp_k_head_num, layer.qk_head_dim) for layer in layers])
        calibration = calibration.without_means([bool(layer.logit_cap) for layer in layers])
    head_dims = ops.head_dims(settings.kernels, kvc.device)

    def layouts_of(tier: Tier) -> tuple[PageLayout, ...]:
        formats = calibration.formats_of(tier) if calibration else [tier.format] * len(layers)
        return tuple(
            PageLayout.holding(
                fmt, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim, kvc.pool_page_size, head_dims
            )
            for fmt, layer in zip(formats, layers, strict=True)
        )

    *fine_layouts, layouts = [layouts_of(TIERS[name]) for name in settings.tier.levels] or [layouts_of(settings.tier)]
    windows = tuple(window_of(layer) for layer in layers)
    return Deployment(
        settings=settings,
        calibration=calibration,
        calibration_source=source,
        layer_ids=tuple(layer.layer_id for layer in layers),
        layouts=layouts,
        windows=windows,
        stock_shares=_stock_shares(kvc.model_config, windows),
        # Chosen once: it may build modules, and says in the log what it chose.
        kernels=choose_kernels(settings.kernels, kvc.device, layouts),
        context_tokens=kvc.model_config.context_len,
        window_layers=window_layers,
        window_share=_window_share() if window_layers else 1.0,
        draft_tokens=_draft_tokens(kvc),
        fine_layouts=next(iter(fine_layouts), ()),
        draft_pool_token_bytes=draft_pool_token_bytes(kvc),
    )


def page_identity(kvc: Any, deployment: Deployment) -> str:
    """Names all that the bytes of this rank's pages follow from but for their tokens, for a storage that servers share.
    Raises Refused where the weights cannot be told from others."""
    from sglang.srt.runtime_context import get_parallel

    folder = _folder(kvc.server_args)
    if folder is None:
        raise Refused(
            f"--hicache-storage-backend with --model-path {kvc.server_args.model_path}: allowed is a model whose files "
            "are on this machine, because stored pages of another must not be taken for its own; download it, or drop "
            "--hicache-storage-backend"
        )
    weights = fingerprint(folder, _overrides(kvc.server_args)), _loaded_as(kvc.server_args), kvc.model_config.dtype
    parallel = get_parallel()
    rank = parallel.attn_tp_rank, parallel.attn_tp_size
    calibration = deployment.calibration and deployment.calibration.checksum
    whole = repr((deployment.settings.tier_name, deployment.layouts, calibration, weights, rank))
    return f"deltastore{VERSION}-{hashlib.sha256(whole.encode()).hexdigest()[:32]}"


def attention_layers(model: Any) -> list[Any]:
    """The model's RadixAttention layers by layer_id. A model that SGLang runs on Transformers has them in a dict of its
    own, which is no module."""
    from sglang.srt.layers.radix_attention import RadixAttention

    candidates = [*model.modules(), *getattr(model, "attention_instances", {}).values()]
    layers = [candidate for candidate in candidates if isinstance(candidate, RadixAttention)]
    return sorted(layers, key=lambda layer: layer.layer_id)


def _cached_layers(kvc: Any) -> list[int] | None:
    """Ids of this rank's layers of a hybrid that have a KV cache, as SGLang counts them; None: the model is none."""
    if not kvc.mambaish_config:
        return None
    first, end = kvc.layer_info.start_layer, kvc.layer_info.end_layer
    return [layer_id for layer_id in kvc.mambaish_config.full_attention_layer_ids if first <= layer_id < end]


def _window_layers(kvc: Any, layers: Sequence[Any]) -> tuple[bool, ...]:
    """Of each layer, whether SGLang frees its pages behind its window; empty: of none."""
    if not kvc.is_hybrid_swa:
        return ()
    freed = [layer.layer_id in kvc.layer_info.swa_attention_layer_ids for layer in layers]
    check_windows([layer for layer, is_freed in zip(layers, freed, strict=True) if is_freed], kvc.sliding_window_size)
    return tuple(freed)


def _window_share() -> float:
    """Tokens that SGLang's pool of layers with a window has for each of the other pool's."""
    from sglang.srt.runtime_context import get_schedule

    return float(get_schedule().swa_full_tokens_ratio)


def _draft_tokens(kvc: Any) -> int:
    """Of a step, for each request; 0: the server does not speculate."""
    if kvc.spec_algorithm.is_none():
        return 0
    from sglang.srt.runtime_context import get_spec

    return int(get_spec().speculative_num_draft_tokens)


def _stock_shares(model_config: Any, windows: Sequence[int | None]) -> tuple[float, ...]:
    """Of each layer, see StoreSize."""
    windowed = [window is not None for window in windows]
    if all(windowed) or not any(windowed) or not frees_windows(model_config):
        return (1.0,) * len(windows)
    return tuple(_window_share() if has_window else 1.0 for has_window in windowed)


def frees_windows(model_config: Any) -> bool:
    """Whether SGLang itself would free what lies behind this model's windows: it has a list of models."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    return bool(is_hybrid_swa_model(model_config.hf_config.architectures, model_config.hf_text_config))


def check_weights(server_args: Any, model_config: Any) -> None:
    """In the launcher, before they are loaded: raises Refused for weights that the configuration does not describe."""
    folder = _folder(server_args)
    if folder and folder.is_dir():
        check_key_rows(folder, model_config.get_total_num_kv_heads(), model_config.head_dim)


def check_calibration(server_args: Any) -> None:
    """In the launcher, before the weights are loaded: raises CalibrationError for a file or a text that cannot be
    used."""
    settings = settings_of(server_args)
    if settings.calibration_text:
        calibration_text.read(Path(settings.calibration_text))
    if settings.calibration == AUTO or settings.tier.format.is_raw:
        return
    folder = _folder(server_args)
    if folder is not None and folder.is_dir() and not weight_files(folder) and settings.calibration != NONE:
        load(Path(settings.calibration))  # whether it is this model's can be told once the weights are downloaded
    else:
        resolve(settings.calibration, folder, _overrides(server_args))


def _calibration(kvc: Any, layers: Sequence[Any], settings: Settings) -> tuple[Calibration | None, str]:
    """This rank's calibration, once SGLang has laid out its ranks, and in words where it comes from."""
    if settings.tier.format.is_raw:
        return None, "none, because raw keeps floats"
    folder = _folder(kvc.server_args)
    if settings.calibration == AUTO:
        whole, source = _made_or_found(kvc, layers, settings.calibration_text, folder)
    else:
        whole = resolve(settings.calibration, folder, _overrides(kvc.server_args))
        source = settings.calibration if whole else "none, as --kv-compress-calibration says"
    if whole is None:
        return None, source
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return whole.of_rank(parallel.attn_tp_rank, parallel.attn_tp_size), source


def _made_or_found(
    kvc: Any, layers: Sequence[Any], text_file: str | None, folder: Path | None
) -> tuple[Calibration | None, str]:
    from .calibrating import calibrate_once

    text = calibration_text.read(Path(text_file)) if text_file else None
    own = fingerprint(folder, _overrides(kvc.server_args)) if folder else ""
    text_name = calibration_text.name_of(text) if text else None
    path = cached_path(own, text_name, _loaded_as(kvc.server_args)) if folder else None
    return calibrate_once(kvc, layers, own, path, text)


def _overrides(server_args: Any) -> dict[str, Any]:
    overrides: dict[str, Any] = json.loads(server_args.json_model_override_args)
    return overrides


def _loaded_as(server_args: Any) -> str | None:
    """What makes other weights of those in the files; gguf is SGLang's own word for what a file is."""
    if server_args.load_format in ("dummy", "flash_rl"):
        return str(server_args.load_format)
    return server_args.quantization if server_args.quantization != "gguf" else None


def _folder(server_args: Any) -> Path | None:
    return local_folder(server_args.model_path, server_args.revision, server_args.download_dir)


def local_folder(model_path: str, revision: str | None, download_dir: str | None) -> Path | None:
    """The model's folder, or its GGUF file, on this machine; a name on the Hub has none while its revision is not there
    yet."""
    if Path(model_path).exists():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_path, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
