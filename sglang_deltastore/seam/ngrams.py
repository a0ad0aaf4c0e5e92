"""What drafts need of SGLang, in a scheduler that speculates.

Attention over packed pages knows no branches, so drafts of n-grams are made a chain. SGLang fills what it has no drafts
for with token 0, each a branch of its own, so that even a single guess is a tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .targets import LAST_SLOT, NGRAM_DRAFTS


def register() -> None:
    """Before the first batch; elsewhere the modules that this patches are not loaded."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in ((NGRAM_DRAFTS, as_chains), (LAST_SLOT, last_slot)):
        HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()


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
