"""merge_state in Triton: one program for some rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import use_asm
from .._triton_attention import LN_2, LOG2_E

ROWS = 32


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the twin."""
    use_asm(out_a)
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    count = lse.numel()
    if count:
        sides = (side.contiguous() for side in (out_a, lse_a, out_b, lse_b))
        merge_rows[(triton.cdiv(count, ROWS),)](*sides, out, lse, count, ROWS=ROWS, HEAD_DIM=out.shape[-1])
    return out, lse


@triton.jit
def merge_rows(out_a, lse_a, out_b, lse_b, out, lse, count, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows [count, D] and their lse [count]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    sum_a = tl.load(lse_a + row, mask=exists, other=float("-inf"))
    sum_b = tl.load(lse_b + row, mask=exists, other=float("-inf"))
    top = tl.maximum(tl.maximum(sum_a, sum_b), -1.0e30)
    weight_a, weight_b = tl.exp2((sum_a - top) * LOG2_E), tl.exp2((sum_b - top) * LOG2_E)
    total = weight_a + weight_b
    divisor = tl.where(total > 0, total, 1.0)
    offset = row.to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    # An output without weight may be anything: it is not read.
    left = tl.load(out_a + offset, mask=(exists & (weight_a > 0))[:, None], other=0.0).to(tl.float32)
    right = tl.load(out_b + offset, mask=(exists & (weight_b > 0))[:, None], other=0.0).to(tl.float32)
    merged = left * (weight_a / divisor)[:, None] + right * (weight_b / divisor)[:, None]
    tl.store(out + offset, merged.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(lse + row, tl.where(total > 0, top + tl.log2(divisor) * LN_2, float("-inf")), mask=exists)
