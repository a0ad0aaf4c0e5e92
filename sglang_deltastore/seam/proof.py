"""Asked for and not in force = the server stops.

SGLang logs a failed plugin and goes on, and would then serve plain KV under our name. So the
scheduler proves, once it is built, that pool, attention and tree are ours and as small as promised;
and the launcher does not serve before every scheduler has sent that proof.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from ..policy.refusals import Refused
from .flags import settings_of
from .given import EXIT_CODE, in_a_sentence
from .targets import DRAFT_HOOKS, SCHEDULER_HOOKS, missing_hooks

PROOF_KEY = "deltastore"
_LOOK_SECONDS = 0.5


class NotInForce(RuntimeError):
    """DeltaStore was asked for, but SGLang runs something else."""


def add_proof(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """AFTER Scheduler.get_init_info, which SGLang calls once the scheduler is built."""
    from .kv_pool import packed_pool
    from .start_line import log_start

    if settings_of(scheduler.server_args).enabled:
        info[PROOF_KEY] = prove(scheduler)
        pool = packed_pool(scheduler.tp_worker.model_runner.token_to_kv_pool)
        log_start(pool.settings, pool.store, pool.calibration_source, scheduler.tp_worker.model_runner.dtype)
    return info


def prove(scheduler: Any) -> dict[str, Any]:
    """Check that what was asked for is what runs. Raises NotInForce."""
    from .backend import DeltaAttentionBackend
    from .kv_pool import DeltaKVPool, packed_pool
    from .tree import DeltaRadixCache

    speculates = not scheduler.spec_algorithm.is_none()
    if missing := missing_hooks(SCHEDULER_HOOKS + DRAFT_HOOKS * speculates):
        raise NotInForce(f"deltastore asked for, but these hooks did not apply, see the log above: {missing}")
    runner = scheduler.tp_worker.model_runner
    backend = runner.attn_backend
    for what, live, ours in (
        ("KV pool", packed_pool(scheduler.token_to_kv_pool_allocator.get_kvcache()), DeltaKVPool),
        ("KV pool of the model runner", packed_pool(runner.token_to_kv_pool), DeltaKVPool),
        # SGLang wraps a hybrid's: its other layers have another.
        ("attention backend", getattr(backend, "full_attn_backend", backend), DeltaAttentionBackend),
        ("radix tree", scheduler.tree_cache, DeltaRadixCache),
    ):
        if not isinstance(live, ours):
            raise NotInForce(
                f"deltastore asked for, but SGLang built {type(live).__name__} as {what}, not {ours.__name__}; "
                "see the log above"
            )
    pool = packed_pool(runner.token_to_kv_pool)
    _prove_draft_bytes(pool.store, scheduler.draft_worker and scheduler.draft_worker.primary_draft_kv_pool)
    return _prove_bytes(pool, scheduler.max_total_num_tokens)


def _prove_bytes(pool: Any, capacity_tokens: int) -> dict[str, Any]:
    """What is allocated must be what the tier promises, down to the byte."""
    store = pool.store
    size = store.size
    pages_bytes = size.pages_bytes(store.num_pages + 1, store.num_window_pages + 1)
    promised = pages_bytes + size.frames_bytes + size.sinks_bytes(store.num_pages)
    allocated = pool.get_kv_size_bytes()
    held_tokens = store.num_pages * pool.page_size
    if allocated != promised or held_tokens != capacity_tokens:
        raise NotInForce(
            f"deltastore promised {promised} bytes for {capacity_tokens} tokens, "
            f"but {allocated} bytes for {held_tokens} tokens are allocated"
        )
    return {"tier": pool.settings.tier_name, "bytes_per_token": store.size.bytes_per_token}


def _prove_draft_bytes(store: Any, draft_pool: Any) -> None:
    """A draft model's own pool must be what the budget for KV has paid for."""
    promised = store.size.draft_pool_bytes(store.num_pages)
    allocated = sum(draft_pool.get_kv_size_bytes()) if draft_pool else 0
    if allocated != promised:
        raise NotInForce(
            f"deltastore counted {promised} bytes for the draft model's own KV, but {allocated} bytes are allocated"
        )


def end_with_a_refusal(original: Any, controller: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND DataParallelController.launch_dp_schedulers, which would wait forever for a scheduler that refuses to
    start: this process ends as that one did."""
    started = threading.Event()

    def watch() -> None:
        while not started.wait(_LOOK_SECONDS):
            if any(process.exitcode == EXIT_CODE for process in controller.scheduler_procs):
                os._exit(EXIT_CODE)

    threading.Thread(target=watch, daemon=True).start()
    original(controller, *args, **kwargs)
    started.set()


def pass_proofs_on(info: dict[str, Any], controller: Any) -> dict[str, Any]:
    """AFTER DataParallelController.get_init_info, which tells the launcher of all its schedulers at once: one proof,
    if each has one."""
    proofs = [of_scheduler.get(PROOF_KEY) for of_scheduler in controller._scheduler_init_infos]
    if proofs and None not in proofs:
        info[PROOF_KEY] = proofs[0]
    return info


def require_proof(original: Any, scheduler_pipe_readers: list[Any], scheduler_procs: list[Any]) -> list[dict[str, Any]]:
    """AROUND engine._wait_for_scheduler_ready, in the launcher."""
    from sglang.srt.runtime_context import get_context

    server_args = get_context().server_args
    try:
        infos = original(scheduler_pipe_readers, scheduler_procs)
    except RuntimeError as died:
        if any(process.exitcode == EXIT_CODE for process in scheduler_procs):
            with in_a_sentence(server_args):
                raise Refused("the scheduler refused to start; its reason is above") from died
        raise
    if settings_of(server_args).enabled:
        for rank, info in enumerate(infos):
            if PROOF_KEY not in info:
                raise NotInForce(
                    f"deltastore asked for, but scheduler {rank} did not prove that it is in force; see its log above"
                )
    return infos
