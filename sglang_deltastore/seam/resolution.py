"""Our steps in SGLang's pipeline that turns raw arguments into resolved ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..policy import refusals
from ..policy.config import BACKEND_NAME, DEFAULT_PAGE_TOKENS, HOST_IO_BACKEND, HOST_MEMORY_LAYOUT
from .adapters import on_cpu as adapters_on_cpu
from .deployment import check_calibration, check_weights
from .drafts import chain_of, draft_model_config
from .flags import check_fields, settings_of
from .given import check_given, in_a_sentence
from .targets import LAUNCHER_HOOKS, missing_hooks

_SOURCE = "deltastore"

_STAND_IN = "triton"
"""The backend of SGLang's whose compatibility rules fit ours, on a CPU too: with windows and learned sinks."""

EARLIEST_STEP = "handle_deprecated_dp_attention"
"""The first step of SGLang's pipeline."""

logger = logging.getLogger(__name__)


def register() -> None:
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    add_attention_backend_choices([BACKEND_NAME])
    register_resolution_hook(EARLIEST_STEP)(_given_step)
    register_resolution_hook("handle_missing_default_values")(_defaults_step)
    register_resolution_hook("handle_cuda_graph_config")(_graphs_step)
    register_resolution_hook("handle_model_specific_adjustments")(_model_step)
    register_resolution_hook("handle_other_validations")(_last_step)


def _given_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse what excludes us before SGLang looks at anything itself."""
    with in_a_sentence(server_args):
        check_fields(server_args)
    if settings_of(server_args).enabled:
        with in_a_sentence(server_args):
            if missing := missing_hooks(LAUNCHER_HOOKS):
                raise refusals.Refused(f"--kv-compress deltastore: these hooks did not apply, see the log: {missing}")
            check_given(server_args)
    previous(server_args)


def _defaults_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Declare what everything else builds on."""
    previous(server_args)
    if not settings_of(server_args).enabled:
        return

    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    device = resolving_view(server_args).device
    with in_a_sentence(server_args):
        refusals.check_device(device)
    if device != "cpu":
        logger.warning(
            "DeltaStore's kernels for %s have never run on a GPU: they are proven without one (README).", device
        )
    declare_resolution(
        server_args,
        _SOURCE,
        page_size=server_args.page_size or DEFAULT_PAGE_TOKENS,
        radix_cache_backend=BACKEND_NAME,
        # Until the last step: models check the backend against lists of SGLang's own.
        attention_backend=_STAND_IN,
        hicache_mem_layout=HOST_MEMORY_LAYOUT,
        hicache_io_backend=HOST_IO_BACKEND,
        # SGLang's own sizing by it knows its own pools alone; ours looks itself whether there is room.
        hicache_host_memory_fraction=None,
        **chain_of(server_args, device),
        **(adapters_on_cpu(server_args) if device == "cpu" else {}),
    )


def _graphs_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Decode steps can be graphs; an extend plans on the host. Without prefill graphs SGLang also sizes its pool
    before it captures, as ours needs."""
    previous(server_args)
    if not settings_of(server_args).enabled:
        return

    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    graphs = with_phase(resolving_view(server_args).cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED)
    declare_resolution(server_args, _SOURCE, cuda_graph_config=graphs)


def _model_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Refuse a model before SGLang looks for what it needs, and ends with an assertion where it is not there."""
    if settings_of(server_args).enabled:
        from sglang.srt.arg_groups import mamba_hook
        from sglang.srt.arg_groups.overrides import model_config_of, resolving_view

        settings, model_config = settings_of(server_args), model_config_of(server_args)
        with in_a_sentence(server_args):
            if drafting := draft_model_config(server_args):
                refusals.check_draft_model(drafting, model_config_of(server_args))
            refusals.check_model(
                model_config,
                settings.show_prompts,
                keeps_states=mamba_hook._platform_supports_mamba_cache_extra_buffer(),
                host_memory=server_args.enable_hierarchical_cache,
                speculates=bool(server_args.speculative_algorithm),
            )
            refusals.check_levels(
                settings.tier,
                resolving_view(server_args).device,
                settings.kernels,
                host_memory=server_args.enable_hierarchical_cache,
                has_window_pool=model_config.is_hybrid_swa,
            )
    previous(server_args)


def _last_step(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    if not settings_of(server_args).enabled:
        return

    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of

    with in_a_sentence(server_args):
        check_weights(server_args, model_config_of(server_args))
        check_calibration(server_args)
    declare_resolution(
        server_args,
        _SOURCE,
        attention_backend=BACKEND_NAME,
        prefill_attention_backend=None,
        decode_attention_backend=None,
    )
