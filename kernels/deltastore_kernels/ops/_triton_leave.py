"""What follows attention of a decode step, in one launch: a row's parts become one, learned sinks take their share, and
the row leaves the stored basis. Of both GPU backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..context import Scoring
from ._triton import hadamard_rows, model_dim
from ._triton_attention import LN_2, LOG2_E, LOWEST

if TYPE_CHECKING:
    from ..basis import Basis

BLOCK_PARTS = 16


def leave(
    partial_out: torch.Tensor,
    partial_log2: torch.Tensor,
    query_rot: torch.Tensor,
    scoring: Scoring,
    basis: Basis | None,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """partial_out [B, Hq, parts, D] float32, the softmax-weighted sum of values of each part, and partial_log2 [B, Hq,
    parts] float32, log2(sum of exp(score)): -inf for a part without tokens, whose partial_out is not read. query_rot
    [B, Hq, D] is contiguous; basis, sink_logits: as of attend_decode, whose result this is."""
    batch, query_heads, parts, head_dim = partial_out.shape
    out_dim = basis.layout.value_dim if basis is not None and basis.layout else head_dim
    out = query_rot.new_empty(batch, query_heads, out_dim)
    lse = partial_log2.new_empty(batch, query_heads)
    mean = None if basis is None or basis.key_basis is None else basis.rotated_mean
    has_sinks = basis is not None and sink_logits is not None
    if batch:
        leave_row[(batch * query_heads,)](
            partial_out,
            partial_log2,
            parts,
            query_rot,
            sink_logits if has_sinks else lse,
            mean if has_sinks and mean is not None else lse,
            out,
            lse,
            scoring.scale,
            head_dim**-0.5,
            QUERY_HEADS=query_heads,
            GROUP=1 if mean is None else query_heads // len(mean),
            HEAD_DIM=head_dim,
            OUT_DIM=out_dim,
            RESTORED=basis is not None,
            HAS_SINKS=has_sinks,
            HAS_MEAN=has_sinks and mean is not None,
            **launch(head_dim),
        )
    return out, lse


def launch(head_dim: int) -> dict[str, int]:
    """Launch options of `leave_row`."""
    return {"ROUNDS": head_dim.bit_length() - 1, "BLOCK": BLOCK_PARTS, "num_warps": max(1, head_dim // 128)}


@triton.jit
def leave_row(
    partial_out,  # [rows, parts, D] float32
    partial_log2,  # [rows, parts] float32
    parts,
    query_rot,  # [rows, D]
    sink_logits,  # [Hq], read if HAS_SINKS
    rotated_mean,  # [H, D] float32, read if HAS_MEAN
    out,  # [rows, OUT_DIM]
    lse,  # [rows] float32
    score_scale,
    scale,
    QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OUT_DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESTORED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """One row's parts, weighted by their sums. Zeros and -inf where every part is empty."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    top, total = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    merged = tl.zeros((1, HEAD_DIM), tl.float32)
    for first in tl.range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        sums = tl.load(partial_log2 + row * parts + part, mask=part < parts, other=float("-inf"))
        filled = sums > float("-inf")
        offset = (row * parts + part)[:, None] * HEAD_DIM + dims[None, :]
        rows = tl.load(partial_out + offset, mask=filled[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(sums, 0))
        weights = tl.exp2(sums - new_top)  # -inf and LOWEST: 0
        keep = tl.exp2(top - new_top)
        merged = merged * keep[:, None] + tl.sum(rows * weights[:, None], 0)[None, :]
        top, total = new_top, total * keep + tl.sum(weights, 0)
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    log2_sum = tl.where(seen, top + tl.log2(divisor), float("-inf"))
    tl.store(lse + row + tl.arange(0, 1), log2_sum * LN_2)
    if HAS_SINKS:
        head = tl.program_id(0) % QUERY_HEADS
        missing = 0.0
        if HAS_MEAN:
            query = tl.load(query_rot + row * HEAD_DIM + dims).to(tl.float32)
            missing = tl.sum(query * tl.load(rotated_mean + head // GROUP * HEAD_DIM + dims), 0) * score_scale
        against = tl.load(sink_logits + head).to(tl.float32) - missing
        left = 1 + tl.exp2(against * LOG2_E - log2_sum)  # one over the share that is left
        divisor *= tl.where(seen, left, 1.0)
    merged /= divisor[:, None]
    if RESTORED:
        merged = hadamard_rows(merged, ROUNDS) * scale
    place, exists = model_dim(dims, OUT_DIM, HEAD_DIM)
    out_row = out + row * OUT_DIM + place
    tl.store(out_row[None, :], merged.to(out.dtype.element_ty), mask=exists[None, :])
