"""What drafts need of SGLang, where a server speculates.

Attention over packed pages knows no branches, so drafts are a chain. Those of n-grams are made one: SGLang fills what
it has no drafts for with token 0, each a branch of its own, so that even a single guess is a tree. A draft model writes
its own keys and values into SGLang's own pool, beside ours and with the same slots.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ..policy.options import of_draft_model
from .targets import LAST_SLOT, NGRAM_DRAFTS

DEFAULT_STEPS = 3
"""Drafts that a draft model makes a step, as SGLang has it where it chooses a chain."""

_ATTENTION = {"cpu": "intel_amx", "cuda": "triton"}
"""SGLang's attention for a draft model by device, where none was asked for: our own reads packed pages alone."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Before the first batch; elsewhere the modules that this patches are not loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in ((NGRAM_DRAFTS, as_chains), (LAST_SLOT, last_slot)):
        HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()


def chain_of(server_args: Any, device: str) -> dict[str, Any]:
    """Fields of SGLang's ServerArgs that make drafts a chain, whatever its own defaults are for the model."""
    algorithm = server_args.speculative_algorithm
    if not algorithm:
        return {}
    if not of_draft_model(algorithm):
        logger.info("Drafts of n-grams are a chain with DeltaStore: --speculative-ngram-max-bfs-breadth is 1.")
        return {"speculative_ngram_max_bfs_breadth": 1}
    drafts = server_args.speculative_num_draft_tokens
    steps = server_args.speculative_num_steps or (drafts - 1 if drafts else DEFAULT_STEPS)
    attention = server_args.speculative_draft_attention_backend or _ATTENTION[device]
    logger.info(
        "Drafts are a chain with DeltaStore: --speculative-num-steps %d --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens %d; the draft model's own attention is %s.",
        steps, steps + 1, attention,
    )  # fmt: skip
    return {
        "speculative_num_steps": steps,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": steps + 1,
        "speculative_draft_attention_backend": attention,
    }


def draft_model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of the draft model; None: drafts come of none."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig

    if not of_draft_model(server_args.speculative_algorithm):
        return None
    view = resolving_view(server_args)
    return ModelConfig.from_server_args(
        server_args,
        model_path=view.speculative_draft_model_path,
        model_revision=view.speculative_draft_model_revision,
        is_draft_model=True,
    )


def draft_pool_token_bytes(kvc: Any) -> int:
    """Of a token in the draft model's own pool, in all its layers, on this rank; 0: drafts come of none."""
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
    from sglang.srt.mem_cache.layout.fused_draft import draft_kv_profile
    from sglang.srt.runtime_context import get_model

    if not of_draft_model(kvc.spec_algorithm.name):
        return 0
    config, layers = kvc.spec_aux_config.draft_model_config, kvc.spec_aux_config.draft_kv_num_layers
    kinds = draft_kv_profile(config, num_layers=layers, attn_tp_size=kvc.draft_attn_tp_size).kinds.values()
    values = sum(
        len(kind.layer_ids) * kind.geometry.head_num * (kind.geometry.head_dim + kind.geometry.v_head_dim)
        for kind in kinds
    )
    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=get_model().kv_cache_dtype,
        model=None,
        model_dtype=config.dtype,
        is_draft_worker=True,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    return int(values * dtype.itemsize)


def last_slot(original: Any, req_to_token: Any, *requests: Any) -> Any:
    """AROUND allocation.get_last_loc, which would run Triton's kernel on a CPU, by the attention backend's name."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return (get_last_loc_torch if req_to_token.device.type == "cpu" else original)(req_to_token, *requests)


def as_chains(original: Any, worker: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """AROUND NGRAMWorker._prepare_draft_tokens."""
    tokens, mask = original(worker, batch)
    return longest_chains(tokens, mask, worker.draft_token_num)


def longest_chains(tokens: np.ndarray, mask: np.ndarray, drafts: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B * N], mask [B * N * N] bool: whether draft i has draft j above it, or is it; drafts: N -> the same of
    each tree's longest branch, with token 0 as the guess for what it is too short for."""
    trees = mask.reshape(-1, drafts, drafts).astype(bool)
    deepest = trees.sum(2).argmax(1)
    branch = np.take_along_axis(trees, deepest[:, None, None], 1)[:, 0]
    first = np.argsort(~branch, axis=1, kind="stable")
    chain = np.take_along_axis(tokens.reshape(-1, drafts), first, 1)
    chain = np.where(np.arange(drafts) < branch.sum(1)[:, None], chain, 0)
    causal = np.broadcast_to(np.tri(drafts, dtype=mask.dtype), trees.shape)
    return chain.flatten().astype(tokens.dtype), causal.flatten()
