"""What of SGLang we hook, for the versions in `refusals.TESTED_VERSIONS`.

SGLang only logs a hook that fails to apply, so `missing_hooks` is asked again at boot, in every
process that needs one (see proof.py).
"""

from __future__ import annotations

from ..policy.request_rules import REFUSED_CONTROLS, REFUSED_WITH_STORAGE

ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
FROM_CLI_ARGS = "sglang.srt.server_args.ServerArgs.from_cli_args"
WAIT_FOR_SCHEDULER = "sglang.srt.entrypoints.engine._wait_for_scheduler_ready"
RUN_HTTP_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
_REPLICAS = "sglang.srt.managers.data_parallel_controller.DataParallelController"
LAUNCH_REPLICAS = f"{_REPLICAS}.launch_dp_schedulers"
REPLICAS_INFO = f"{_REPLICAS}.get_init_info"
_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
GENERATE_REQUEST = f"{_TOKENIZER_MANAGER}.generate_request"
VALIDATE_REQUEST = f"{_TOKENIZER_MANAGER}._validate_one_request"
TOKENIZED_REQUEST = f"{_TOKENIZER_MANAGER}._create_tokenized_object"
CONTROLS = {command: f"{_TOKENIZER_MANAGER}.{command}" for command in (*REFUSED_CONTROLS, *REFUSED_WITH_STORAGE)}
REQUEST_AUTH = "sglang.srt.utils.auth.decide_request_auth"
POOL_CONFIGURATOR = "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator"
BUILD_POOL = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool"
ADAPTERS = "sglang.srt.lora.lora_manager.LoRAManager.__init__"
ALLOCATE_ROWS = "sglang.srt.mem_cache.allocation.alloc_req_slots"
INIT_INFO = "sglang.srt.managers.scheduler.Scheduler.get_init_info"
ON_IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
POOL_STATS = "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats"
INTERNAL_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._add_topology"
)

LAST_SLOT = "sglang.srt.mem_cache.allocation.get_last_loc"
NGRAM_DRAFTS = "sglang.srt.speculative.ngram_worker.NGRAMWorker._prepare_draft_tokens"

REPLICA_HOOKS = (LAUNCH_REPLICAS, REPLICAS_INFO)
"""In the process between launcher and schedulers, where there are replicas."""

REQUEST_HOOKS = (GENERATE_REQUEST, VALIDATE_REQUEST, TOKENIZED_REQUEST, *CONTROLS.values())
LAUNCHER_HOOKS = (ADD_CLI_ARGS, FROM_CLI_ARGS, WAIT_FOR_SCHEDULER, RUN_HTTP_SERVER, REQUEST_AUTH, *REQUEST_HOOKS)
SCHEDULER_HOOKS = (
    ADAPTERS, POOL_CONFIGURATOR, BUILD_POOL, ALLOCATE_ROWS, INIT_INFO, ON_IDLE, SAMPLE, POOL_STATS, INTERNAL_STATE
)  # fmt: skip
DRAFT_HOOKS = (NGRAM_DRAFTS, LAST_SLOT)
"""Where the server speculates."""

HTTP_APP_VARIABLE = "SGLANG_HTTP_SERVER_APP_PATH"
"""Names the app that the processes of --tokenizer-worker-num import;"""

WORKER_APP = "sglang_deltastore.seam.http_worker:app"
"""ours."""


def missing_hooks(targets: tuple[str, ...]) -> list[str]:
    """Those of `targets` that SGLang has not patched in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [target for target in targets if target not in HookRegistry._patched]
