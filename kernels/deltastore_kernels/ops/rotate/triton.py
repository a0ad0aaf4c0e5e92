"""rotate in Triton: butterflies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import hadamard_rows, use_asm

BLOCK_ELEMENTS = 4096


def rotate(x: torch.Tensor) -> torch.Tensor:
    """See the twin; sums in float32."""
    head_dim = x.shape[-1]
    assert head_dim & (head_dim - 1) == 0, f"head_dim={head_dim} is no power of two"
    use_asm(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    count, rows = x.numel() // head_dim, BLOCK_ELEMENTS // head_dim
    if count:
        rotate_rows[(triton.cdiv(count, rows),)](
            x.contiguous(), out, count, head_dim**-0.5, ROWS=rows, HEAD_DIM=head_dim, ROUNDS=head_dim.bit_length() - 1
        )
    return out


@triton.jit
def rotate_rows(x, out, count, scale, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, ROUNDS: tl.constexpr):
    """Rows [count, D]; ROUNDS = log2(D)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = row.to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    exists = (row < count)[:, None]
    rotated = hadamard_rows(tl.load(x + offset, mask=exists, other=0.0).to(tl.float32), ROUNDS)
    tl.store(out + offset, (rotated * scale).to(out.dtype.element_ty), mask=exists)
