"""The canary in SGLang's scheduler: what sampled requests were served, and what raw attention says of the same tokens.

SGLang itself is asked for nothing: log-probabilities are taken from a step's logits before it samples, so no request
and no answer is changed. The second run is a pass of its own (raw_pass.py) while the scheduler has nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.managers.utils import is_health_check_generate_req

from ..observe.canary import Canary
from ..observe.guard import GUARD
from .facts import someone_knocks
from .flags import settings_of
from .raw_pass import raw_logits
from .tree import DeltaRadixCache

_CANARIES: WeakKeyDictionary[Any, Canary] = WeakKeyDictionary()
"""By SGLang's ModelRunner; empty where nothing is sampled."""


class CanaryOfRequests:
    """The canary, told of SGLang's requests."""

    def __init__(self, canary: Canary) -> None:
        self.canary = canary

    def begin(self, requests: Iterable[Any]) -> None:
        for req in requests:
            if not is_health_check_generate_req(req):
                self.canary.begin(req.rid, len(req.origin_input_ids), _is_of_tokens_alone(req))

    def end(self, req: Any) -> None:
        if req.finished():
            prompt_tokens = len(req.origin_input_ids)
            self.canary.end(
                req.rid, lambda: [*req.origin_input_ids, *req.output_ids], prompt_tokens, req.cached_tokens, req.lora_id
            )

    def forget(self) -> None:
        """SGLang empties the tree when weights change."""
        self.canary.forget()


def _is_of_tokens_alone(req: Any) -> bool:
    """Whether its tokens say all that it attends to: no images, no embeddings in place of tokens."""
    given = (req.multimodal_inputs, req.input_embeds, req.positional_embed_overrides, req.token_type_ids)
    return all(each is None for each in given)


def attach(_info: dict[str, Any], scheduler: Any) -> None:
    """AFTER Scheduler.get_init_info, which SGLang calls once the scheduler is built."""
    tree, share = scheduler.tree_cache, settings_of(scheduler.server_args).canary
    if not share or not isinstance(tree, DeltaRadixCache):
        return
    runner = scheduler.tp_worker.model_runner

    def raw(token_ids: list[int], first: int, adapter: str | None) -> Iterator[torch.Tensor]:
        if adapter and adapter not in runner.lora_manager.loras:
            return iter(())
        return raw_logits(runner, torch.tensor(token_ids, device=runner.device), first, adapter)

    _CANARIES[runner] = canary = Canary(share, most_tokens(scheduler), raw)
    tree.canary = CanaryOfRequests(canary)


def most_tokens(scheduler: Any) -> int:
    """Of one pass: as many as SGLang's own longest, for which there is memory."""
    longest: int = scheduler.model_config.context_len
    return min(longest, scheduler.chunked_prefill_size or longest)


def before_sampling(runner: Any, logits_output: Any, forward_batch: Any) -> None:
    """BEFORE ModelRunner.sample, which changes the logits."""
    if canary := _CANARIES.get(runner):
        GUARD.watch(
            "what a canary is served", canary.serve, forward_batch.rids, logits_output.next_token_logits,
            forward_batch.seq_lens_cpu.tolist,
        )  # fmt: skip


def when_idle(scheduler: Any) -> None:
    """BEFORE Scheduler.on_idle: a request that comes while a sequence runs again waits for the rest of that run."""
    canary = _CANARIES.get(scheduler.tp_worker.model_runner) if _CANARIES else None
    if canary and canary.waiting and scheduler.is_fully_idle() and not someone_knocks(scheduler):
        GUARD.watch("a canary is run again", canary.run_next)
