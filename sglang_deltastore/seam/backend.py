"""Our attention behind SGLang's attention backend interface."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from deltastore_kernels.context import Scoring

from .. import attention


class DeltaAttentionBackend(AttentionBackend):
    """Plans each step once, then runs every layer over the page store."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan the step. Host-side lists stand in for device tensors wherever SGLang has both."""
        decode = forward_batch.forward_mode.is_decode()
        seq_lens = forward_batch.seq_lens.long()
        new_tokens = torch.ones_like(seq_lens) if decode else forward_batch.extend_seq_lens.long()
        self.forward_metadata = attention.plan_step(
            req_to_token=self.req_to_token_pool.req_to_token,
            request_rows=forward_batch.req_pool_indices.long(),
            prefix_tokens=seq_lens - new_tokens,
            new_tokens=new_tokens,
            page_tokens=self.pool.page_size,
            decode=decode,
        )
        writes = self.forward_metadata.writes
        self.pool.sharing.written(writes.page_ids, writes.tile_ids)

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, **kwargs: Any) -> Any:
        return self._forward(attention.extend, q, k, v, layer, **kwargs)

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, **kwargs: Any) -> Any:
        return self._forward(attention.decode, q, k, v, layer, **kwargs)

    def _forward(
        self, attend: Any, q: Any, k: Any, v: Any, layer: Any, save_kv_cache: bool = True, **extra: Any
    ) -> torch.Tensor:
        """q [T, Hq * D], k, v [T, H, D] -> [T, Hq * D]."""
        unknown = [name for name, value in extra.items() if value is not None]
        if k is None or v is None or not save_kv_cache or unknown:
            raise TypeError(
                f"layer {layer.layer_id} calls attention with k={'no' if k is None else 'yes'}, "
                f"save_kv_cache={save_kv_cache}, {unknown}: DeltaStore stores every layer's own keys and values "
                "and knows no other option; serve this model with --kv-compress none"
            )
        out = attend(
            self.pool.store,
            layer.layer_id - self.pool.start_layer,
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_v_head_num, layer.head_dim),
            self.forward_metadata,
            scoring_of(layer),
        )
        return out.reshape(q.shape[0], -1)

    def support_triton(self) -> bool:
        return False


def scoring_of(layer: Any) -> Scoring:
    """SGLang's window counts the tokens before the query, like ours; -1 means none."""
    window = layer.sliding_window_size
    return Scoring(
        scale=layer.scaling,
        soft_cap=layer.logit_cap or 0.0,
        window_left=window if window is not None and window >= 0 else None,
    )
