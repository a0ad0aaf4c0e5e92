"""One sequence through the model as SGLang has loaded it, with raw attention throughout: no request, no pages, no tree.

Every token attends to the raw keys and values of the same pass. Nothing is read from the store, and nothing is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.layers.attention.attention_registry import attn_backend_wrapper
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from torch.nn.functional import scaled_dot_product_attention

from deltastore_kernels.context import Scoring
from deltastore_kernels.ops._attention import attend_rows
from deltastore_kernels.sink_logits import apply_sink_logits

from .scoring import scoring_of

LOGITS_ROWS = 64
"""Tokens whose logits are there at once: a vocabulary's are larger than all else that a token leaves."""


class RawAttention(AttentionBackend):
    """Causal attention over one sequence from its start."""

    #: Nothing is stored. Models on CUDA ask a pool for its dtype, and write keys and values into it themselves where
    #: that is bfloat16: it is bytes, as DeltaKVPool's.
    token_to_kv_pool = SimpleNamespace(dtype=torch.uint8)
    req_to_token_pool: Any = None

    def saw(self, layer: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        """A layer's queries [T, Hq, D] and keys [T, H, D]."""

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *_args: Any, sinks: Any = None, **_: Any
    ) -> Any:
        """q [T, Hq * D], k [T, H, D], v [T, H, Dv], sinks [Hq] or None -> [T, Hq * Dv]."""
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        key = k.view(-1, layer.tp_k_head_num, layer.head_dim)
        value = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        self.saw(layer, query, key)
        return attend(query, key, value, scoring_of(layer), sinks).reshape(q.shape[0], -1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """query [T, Hq, D], key [T, H, D], value [T, H, Dv], sink_logits [Hq] -> [T, Hq, Dv], causal; torch's own attention
    where it knows how."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if scoring.soft_cap or sink_logits is not None:
        out, lse = attend_rows(query.transpose(0, 1), key.float(), value.float(), scoring)
        return (out if sink_logits is None else apply_sink_logits(out, lse, sink_logits)).to(query.dtype)
    mask = None
    if scoring.window_left is not None:
        at = torch.arange(query.shape[1], device=query.device)
        mask = (at <= at[:, None]) & (at >= at[:, None] - scoring.window_left)
    out = scaled_dot_product_attention(
        query[None], key[None], value[None], mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@torch.inference_mode()
def run_raw(
    owner: Any,
    token_ids: torch.Tensor,
    attention: RawAttention,
    first_position: int = 0,
    adapter: str | None = None,
) -> ForwardBatch:
    """token_ids [T] on the model's device, the first of them at first_position. owner: of the model (SGLang's
    ModelRunner, or its KVCacheConfigurator before there is memory for KV); adapter: SGLang's id of one that is loaded.
    Returns the batch that went through."""
    batch, whole = _prompt(token_ids, first_position), _with_states(owner, attention)
    if adapters := getattr(owner, "lora_manager", None):
        batch.lora_ids = [adapter]
        adapters.fetch_new_loras({adapter})
        adapters.prepare_lora_batch(batch)
    whole.init_forward_metadata(batch)
    with forward_context(ForwardContext(attn_backend=whole)):
        owner.model.forward(batch.input_ids, batch.positions, batch)
    return batch


@torch.inference_mode()
def raw_logits(owner: Any, token_ids: torch.Tensor, first: int, adapter: str | None = None) -> Iterator[torch.Tensor]:
    """Logits behind token_ids[first:], a few tokens' [N, V] at a time, as SGLang has them before it samples.

    A prompt's logits are its last token's alone. So the model's own logits processor is asked again, with the states
    that it was given: as for a decode step, where every state is a request's.
    """
    processor = next(module for module in owner.model.modules() if isinstance(module, LogitsProcessor))
    given: dict[str, Any] = {}

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update(inspect.signature(processor.forward).bind(*args, **kwargs).arguments)

    handle = processor.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        batch = run_raw(owner, token_ids, RawAttention(), adapter=adapter)
    finally:
        handle.remove()
    batch.forward_mode = ForwardMode.DECODE
    for begin in range(first, len(token_ids), LOGITS_ROWS):
        rows = slice(begin, begin + LOGITS_ROWS)
        yield processor(token_ids[rows], given["hidden_states"][rows], given["lm_head"], batch).next_token_logits


def _with_states(owner: Any, attention: RawAttention) -> AttentionBackend:
    """For a hybrid, SGLang's own backend of its other layers beside ours, with the states of one new request."""
    config = mambaish_config(owner.model_config)
    if not config:
        return attention
    layer_info = owner.layer_info
    params = config.mamba2_cache_params
    attention.req_to_token_pool = HybridReqToTokenPool(
        size=1,
        mamba_size=1,
        mamba_spec_state_size=1,
        max_context_len=1,
        device=owner.device,
        enable_memory_saver=False,
        cache_params=params,
        mamba_layer_ids=[i for i in params.layers if layer_info.start_layer <= i < layer_info.end_layer],
        enable_mamba_extra_buffer=False,
        start_layer=layer_info.start_layer,
    )
    runner = SimpleNamespace(
        model_config=owner.model_config,
        server_args=owner.server_args,
        device=owner.device,
        is_draft_worker=False,
        use_mla_backend=False,
        req_to_token_pool=attention.req_to_token_pool,
        token_to_kv_pool=attention.token_to_kv_pool,
        # One of those that SGLang knows to run beside these layers.
        prefill_attention_backend_str="triton",
        decode_attention_backend_str="triton",
    )
    return attn_backend_wrapper(runner, attention)


def _prompt(token_ids: torch.Tensor, first_position: int) -> ForwardBatch:
    """One request's whole prompt, token_ids [T], that stores nothing."""
    tokens, device = len(token_ids), token_ids.device
    positions = torch.arange(first_position, first_position + tokens, device=device)
    length = torch.tensor([tokens], dtype=torch.int32, device=device)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=token_ids,
        req_pool_indices=torch.zeros(1, dtype=torch.int64, device=device),
        seq_lens=length.long(),
        seq_lens_cpu=torch.tensor([tokens]),
        seq_lens_sum=tokens,
        orig_seq_lens=length,
        out_cache_loc=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=positions,
        # Of models with vision; a text's are the same in all three dimensions.
        mrope_positions=positions.expand(3, -1),
        capture_hidden_mode=CaptureHiddenMode.NULL,
        extend_num_tokens=tokens,
        extend_seq_lens=length,
        extend_prefix_lens=torch.zeros_like(length),
        extend_start_loc=torch.zeros_like(length),
        extend_seq_lens_cpu=[tokens],
        extend_prefix_lens_cpu=[0],
        extend_logprob_start_lens_cpu=[0],
    )
