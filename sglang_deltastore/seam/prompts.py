"""Prompts for SGLang's model that belong to no request, and whose attention stores nothing."""

from __future__ import annotations

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode


def prompts(
    token_ids: torch.Tensor,
    context_tokens: int = 0,
    copies: int = 1,
    hidden: CaptureHiddenMode = CaptureHiddenMode.NULL,
) -> ForwardBatch:
    """`copies` times the same tokens [T] behind so many that are stored; hidden: which last hidden states to return."""
    device, tokens = token_ids.device, len(token_ids)
    each = torch.full((copies,), tokens, dtype=torch.int32, device=device)
    prefix = torch.full_like(each, context_tokens)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=copies,
        input_ids=token_ids.repeat(copies),
        req_pool_indices=torch.zeros(copies, dtype=torch.int64, device=device),
        seq_lens=(each + prefix).long(),
        seq_lens_cpu=torch.full((copies,), tokens + context_tokens),
        seq_lens_sum=copies * (tokens + context_tokens),
        orig_seq_lens=each + prefix,
        out_cache_loc=torch.zeros(copies * tokens, dtype=torch.int64, device=device),
        positions=torch.arange(context_tokens, context_tokens + tokens, device=device).repeat(copies),
        capture_hidden_mode=hidden,
        extend_num_tokens=copies * tokens,
        extend_seq_lens=each,
        extend_prefix_lens=prefix,
        extend_start_loc=torch.arange(copies, dtype=torch.int32, device=device) * tokens,
        extend_seq_lens_cpu=[tokens] * copies,
        extend_prefix_lens_cpu=[context_tokens] * copies,
        extend_logprob_start_lens_cpu=[0] * copies,
    )
