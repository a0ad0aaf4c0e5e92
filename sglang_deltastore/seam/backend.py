"""Our attention behind SGLang's attention backend interface."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from ..observe.guard import GUARD
from ..store import steps
from ..store.pages import PageStore
from .kv_pool import packed_pool
from .scoring import scoring_of


class DeltaAttentionBackend(AttentionBackend):
    """Plans each step once, then runs every layer over the page store.

    SGLang's contract for CUDA graphs: `_out_graph` runs before every step, `_in_graph` is recorded with the graph and
    replayed. Decode steps can be recorded, with drafts too, extend steps run eagerly.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        # Under the names by which SGLang's models find them (model_executor/forward_context.py).
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.pool = packed_pool(model_runner.token_to_kv_pool)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: a graph's own memory pool holds what `_in_graph` and the kernels make."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """A padding row is request 0 at its first token: frame 0 takes it, and no page."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if forward_batch.forward_mode.is_decode_or_idle():
            if not in_capture:
                GUARD.watch("a decode step", self.pool.steps.decoded, forward_batch.seq_lens_cpu)
            return
        if forward_batch.forward_mode.is_target_verify():
            if not in_capture:
                total_tokens = forward_batch.seq_lens_cpu + self._draft_tokens
                GUARD.watch("a step over drafts", self.pool.steps.decoded, total_tokens, self._draft_tokens)
            return
        new_tokens = torch.tensor(forward_batch.extend_seq_lens_cpu, dtype=torch.int64)
        prefix_tokens = torch.tensor(forward_batch.extend_prefix_lens_cpu, dtype=torch.int64)
        # SGLang's dry runs, before any request, have all rows on the device alone: 0.
        rows = forward_batch.req_pool_indices_cpu
        frames = [0] * len(new_tokens) if rows is None else rows.tolist()
        self.forward_metadata = steps.plan_extend(*self._requests(forward_batch), frames, prefix_tokens, new_tokens)
        GUARD.watch("an extend step", self.pool.steps.extended, prefix_tokens, new_tokens)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if forward_batch.forward_mode.is_decode_or_idle():
            total_tokens = forward_batch.seq_lens.long()
            self.forward_metadata = steps.plan_decode(*self._requests(forward_batch), total_tokens)
        elif forward_batch.forward_mode.is_target_verify():
            # SGLang counts what comes before the drafts.
            total_tokens, drafts = forward_batch.seq_lens.long() + self._draft_tokens, self._draft_tokens
            self.forward_metadata = steps.plan_decode(*self._requests(forward_batch), total_tokens, drafts)

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Nothing: the plan of a step over drafts depends on lengths alone."""

    @property
    def _draft_tokens(self) -> int:
        return self.pool.store.size.draft_tokens

    def _requests(self, forward_batch: Any) -> tuple[PageStore, torch.Tensor, torch.Tensor]:
        """The store, SGLang's request table, and the batch's rows in it."""
        return self.pool.store, self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices.long()

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_batch.forward_mode.is_target_verify():
            return self._forward(steps.decode, q, k, v, layer, *args, **kwargs)
        out = self._forward(steps.extend, q, k, v, layer, *args, **kwargs)
        if drift := self.pool.drift:
            query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
            GUARD.watch("queries", drift.extended, self.pool.layer_index[layer.layer_id], query)
        return out

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(steps.decode, q, k, v, layer, *args, **kwargs)

    def _forward(
        self,
        attend: Any,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        """q [T, Hq * D], k [T, H, D], v [T, H, Dv], sinks [Hq]: a learned logit of each query head -> [T, Hq * Dv]."""
        unknown = [name for name, value in extra.items() if value is not None]
        if k is None or v is None or not save_kv_cache or unknown:
            raise TypeError(
                f"layer {layer.layer_id} calls attention with k={'no' if k is None else 'yes'}, "
                f"save_kv_cache={save_kv_cache}, {unknown}: DeltaStore stores every layer's own keys and values "
                "and knows no other option; serve this model with --kv-compress none"
            )
        index = self.pool.layer_index[layer.layer_id]
        self.pool.wait_for_layer(index)
        out = attend(
            self.pool.store,
            index,
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            self.forward_metadata,
            scoring_of(layer),
            sink_logits=sinks,
        )
        return out.reshape(q.shape[0], -1)

    def support_triton(self) -> bool:
        return False
