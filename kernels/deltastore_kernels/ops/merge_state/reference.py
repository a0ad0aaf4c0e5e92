"""merge_state: two attentions of the same queries over different tokens -> the one over all of them."""

from __future__ import annotations

import torch


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_a, out_b [T, Hq, D] float, lse_a, lse_b [T, Hq] float32 (natural logarithms) -> out, lse, in the same dtypes.

    -inf is an attention over no token: its output does not count, whatever it is. Of two such, out is zeros.
    """
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top.isneginf(), 0.0, top)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    divisor = torch.where(total > 0, total, 1.0)
    parts = (
        torch.where(weight[..., None] > 0, out.float(), 0.0) * (weight / divisor)[..., None]
        for out, weight in ((out_a, weight_a), (out_b, weight_b))
    )
    return sum(parts).to(out_a.dtype), top + total.log()
