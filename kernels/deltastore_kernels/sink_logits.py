"""Learned attention sinks (gpt-oss, MiMo): one more term in a softmax's denominator, with nothing to read behind it.

    out = sum_i exp(score_i) value_i / (exp(sink_logit) + sum_i exp(score_i))

Attention as every backend computes it gives the rest, so the term comes after it, over whatever was merged. Not to be
mixed up with sinks: the first tokens of a sequence, which are read as any others.
"""

from __future__ import annotations

import torch


def apply_sink_logits(out: torch.Tensor, lse: torch.Tensor, sink_logits: torch.Tensor) -> torch.Tensor:
    """out [T, Hq, D] and lse [T, Hq] (natural logarithm) of attention without them, sink_logits [Hq], any float dtypes
    -> out with them, in its dtype. A row that saw no token (lse -inf) gets zeros, whatever its out holds."""
    share = torch.sigmoid(lse.float() - sink_logits.float())[..., None]
    return torch.where(share > 0, out * share, 0).to(out.dtype)
