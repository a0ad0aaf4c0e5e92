"""Our steps in SGLang's pipeline that turns raw arguments into resolved ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import refusals
from ..config import BACKEND_NAME, DEFAULT_PAGE_TOKENS
from .calibration import calibration_of
from .flags import settings_of
from .targets import LAUNCHER_HOOKS, missing_hooks

_SOURCE = "deltastore"


def register() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    add_attention_backend_choices([BACKEND_NAME])
    register_resolution_hook("handle_missing_default_values")(_first_step)
    register_resolution_hook("handle_other_validations")(_last_step)


def _first_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse what excludes us before anything heavy happens; declare what everything else builds on."""
    if not settings_of(server_args).enabled:
        return previous(server_args)
    refusals.check_version()
    if missing := missing_hooks(LAUNCHER_HOOKS):
        raise refusals.Refused(f"--kv-compress deltastore: these hooks did not apply, see the log: {missing}")
    refusals.check_options(server_args)
    previous(server_args)

    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    refusals.check_device(resolving_view(server_args).device)
    declare_resolution(
        server_args,
        _SOURCE,
        page_size=server_args.page_size or DEFAULT_PAGE_TOKENS,
        radix_cache_backend=BACKEND_NAME,
        # One pool for all layers; a sliding window is applied in attention.
        disable_hybrid_swa_memory=True,
        # Until the last step: models check the backend against lists of SGLang's own, and what
        # this one turns off on the way (CUDA graphs) we want off too.
        attention_backend="torch_native",
    )


def _last_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    if not settings_of(server_args).enabled:
        return

    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of

    refusals.check_model(model_config_of(server_args))
    calibration_of(server_args)  # a file that cannot be used is refused before the weights are loaded
    declare_resolution(
        server_args,
        _SOURCE,
        attention_backend=BACKEND_NAME,
        prefill_attention_backend=None,
        decode_attention_backend=None,
    )
