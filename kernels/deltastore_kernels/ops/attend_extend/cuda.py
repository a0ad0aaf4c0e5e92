"""attend_extend through FlashInfer: its prefill kernels over new tokens and, part by part, over the decoded context.

    out = merge(new tokens over each other, causal;  new tokens over stored tokens of part 0;  of part 1; ..)

FlashInfer has no hook for loading keys and values, so stored tokens become 16-bit floats in a workspace of fixed size
first, never all at once. Its kernels give logarithms to base 2; ours are natural.
"""

from __future__ import annotations

import math

import torch

from ... import cuda_build
from ...context import PagedContext, Scoring
from .._cuda import fallback
from .._flashinfer import Plan, Shape, flashinfer, make_plan, workspaces
from .._step import once_a_step, stored_tokens
from ..decode.cuda import decode_context

WORKSPACE_BYTES = 64 << 20
"""Keys and values of one part as 16-bit floats: 16,384 tokens of Llama 3 8B's layer. Larger parts are not faster:
each is a whole prefill kernel."""


def attend_extend(
    query_rot: torch.Tensor,
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    new_tokens: list[int],
    context: PagedContext,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin, in query_rot's precision. Plans once for all layers of a step that keep it (context.kept), and waits
    for nothing where the host knows how long the contexts are (context.stored_tokens), else once."""
    stored = stored_tokens(context)
    longest = max((old + new for old, new in zip(stored, new_tokens, strict=True)), default=0)
    plan = None
    if expressible(query_rot, context, scoring, longest):
        plan = _plan(query_rot, new_tokens, context, scoring)
    if plan is None:
        return fallback("attend_extend")(query_rot, key_rot, value_rot, new_tokens, context, scoring)
    out_rot, lse = _run(plan.new, query_rot, key_rot, value_rot)
    for part in plan.parts:
        sides = decode_context(part.requests, part.positions, context, query_rot.dtype)
        found = _run(part.wrapper, query_rot[part.rows], *sides)
        out_rot[part.rows], lse[part.rows] = flashinfer().merge_state(out_rot[part.rows], lse[part.rows], *found)
    return out_rot, lse * math.log(2)


def _plan(query_rot: torch.Tensor, new_tokens: list[int], context: PagedContext, scoring: Scoring) -> Plan | None:
    """None where FlashInfer would need more plans than there may be."""
    layout, device = context.layout, query_rot.device
    shape = Shape(
        query_rot.shape[1], layout.num_kv_heads, layout.head_dim, query_rot.dtype, scoring.scale, scoring.soft_cap
    )
    room_tokens = max(1, WORKSPACE_BYTES // (layout.num_kv_heads * layout.head_dim * 2 * query_rot.element_size()))
    wrappers = once_a_step(context, "flashinfer_wrappers", lambda: workspaces(device).begin_step())
    return once_a_step(
        context, shape, lambda: make_plan(wrappers, shape, new_tokens, stored_tokens(context), room_tokens)
    )


def _run(wrapper: object, *sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query, key and value rows of what the wrapper is planned for -> out_rot, lse to base 2."""
    dtype = sides[0].dtype
    return wrapper.run(*(side.to(dtype).contiguous() for side in sides), return_lse=True, lse_base="log2")


def expressible(query_rot: torch.Tensor, context: PagedContext, scoring: Scoring, longest_tokens: int) -> bool:
    """Whether FlashInfer's kernels can do it. A window that hides anything cannot be said of a part: FlashInfer takes
    the last key for the last query's own. Some request's whole context is `longest_tokens` long, new ones included."""
    hides = scoring.window_left is not None and scoring.window_left < longest_tokens - 1
    known = query_rot.dtype in (torch.float16, torch.bfloat16) and context.layout.head_dim in cuda_build.HEAD_DIMS
    return known and not hides
