"""Prompts for SGLang's model that belong to no request, and whose attention stores nothing."""

from __future__ import annotations

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode


def prompts(
    token_ids: torch.Tensor, context_tokens: int = 0, copies: int = 1, all_logits: bool = False
) -> ForwardBatch:
    """`copies` times the same tokens [T] behind so many that are stored. SGLang has logits for a request's last token:
    all_logits makes each token a request of its own."""
    device, tokens = token_ids.device, len(token_ids)
    total = copies * tokens
    positions = torch.arange(context_tokens, context_tokens + tokens, device=device).repeat(copies)
    step = 1 if all_logits else tokens
    first, last = positions[::step], positions[step - 1 :: step]
    lengths = torch.full_like(first, step, dtype=torch.int32)
    requests = len(first)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=requests,
        input_ids=token_ids.repeat(copies),
        req_pool_indices=torch.zeros(requests, dtype=torch.int64, device=device),
        seq_lens=last + 1,
        seq_lens_cpu=last.cpu() + 1,
        seq_lens_sum=int((last + 1).sum()),
        orig_seq_lens=(last + 1).int(),
        out_cache_loc=torch.zeros(total, dtype=torch.int64, device=device),
        positions=positions,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        extend_num_tokens=total,
        extend_seq_lens=lengths,
        extend_prefix_lens=first.int(),
        extend_start_loc=torch.arange(0, total, step, dtype=torch.int32, device=device),
        extend_seq_lens_cpu=[step] * requests,
        extend_prefix_lens_cpu=first.tolist(),
        extend_logprob_start_lens_cpu=[0] * requests,
    )
