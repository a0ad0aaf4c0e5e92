"""Entry point of SGLang's plugin group `sglang.srt.plugins`; runs in every SGLang process.

Registers everything, decides nothing: each hook is a no-op unless `--kv-compress deltastore`.
"""

from __future__ import annotations

from typing import Any

from ..policy.config import BACKEND_NAME
from . import targets
from .given import from_cli_args, or_end, refuse_before_imports


def register() -> None:
    refuse_before_imports()

    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import adapters, capacity, facts, flags, live_quality, metrics, proof, requests, resolution, routes, tree
    from .kv_pool import build_pool

    resolution.register()
    register_attention_backend(BACKEND_NAME)(_create_backend)
    register_radix_cache_backend(BACKEND_NAME, or_end(tree.create_tree))
    Engine.server_args_class = staticmethod(flags.engine_server_args)
    for target, hook, kind in (
        (targets.ADD_CLI_ARGS, flags.add_cli_args, HookType.AFTER),
        (targets.FROM_CLI_ARGS, from_cli_args, HookType.AROUND),
        (targets.WAIT_FOR_SCHEDULER, proof.require_proof, HookType.AROUND),
        (targets.LAUNCH_REPLICAS, proof.end_with_a_refusal, HookType.AROUND),
        (targets.REPLICAS_INFO, proof.pass_proofs_on, HookType.AFTER),
        (targets.RUN_HTTP_SERVER, routes.add_routes, HookType.BEFORE),
        (targets.REQUEST_AUTH, routes.let_the_page_through, HookType.AROUND),
        (targets.GENERATE_REQUEST, requests.check_sent, HookType.BEFORE),
        (targets.VALIDATE_REQUEST, requests.check_request, HookType.AFTER),
        (targets.TOKENIZED_REQUEST, requests.check_tokenized, HookType.AFTER),
        *((target, requests.refuse_control(command), HookType.BEFORE) for command, target in targets.CONTROLS.items()),
        (targets.ADAPTERS, adapters.on_this_device, HookType.AROUND),
        (targets.POOL_CONFIGURATOR, or_end(capacity.configurator), HookType.AFTER),
        (targets.BUILD_POOL, or_end(build_pool), HookType.AROUND),
        (targets.ALLOCATE_ROWS, tree.begin_requests, HookType.AFTER),
        (targets.INIT_INFO, proof.add_proof, HookType.AFTER),
        (targets.INIT_INFO, facts.attach, HookType.AFTER),
        (targets.INIT_INFO, live_quality.attach, HookType.AFTER),
        (targets.INIT_INFO, metrics.attach, HookType.AFTER),
        (targets.ON_IDLE, facts.when_idle, HookType.BEFORE),
        (targets.ON_IDLE, live_quality.when_idle, HookType.BEFORE),
        (targets.SAMPLE, live_quality.before_sampling, HookType.BEFORE),
        (targets.POOL_STATS, metrics.add_words, HookType.AFTER),
        (targets.INTERNAL_STATE, facts.add_to_internal_state, HookType.AFTER),
    ):
        HookRegistry.register(target, hook, kind)


def _create_backend(model_runner: Any) -> Any:
    from sglang.srt.layers.attention import attention_registry

    from .backend import DeltaAttentionBackend

    # SGLang asks this list next, before it wraps a hybrid's backend.
    attention_registry.HYBRID_GDN_SM100_BACKENDS.add(BACKEND_NAME)

    return DeltaAttentionBackend(model_runner)
