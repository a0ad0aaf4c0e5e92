"""attend_extend through FlashInfer: its prefill kernels over new tokens and, part by part, over the decoded context.

    out = merge(new tokens over each other, causal;  new tokens over stored tokens of part 0;  of part 1; ..)

FlashInfer has no hook for loading keys and values, so stored tokens become 16-bit floats in a workspace of fixed size
first, never all at once. Its kernels give logarithms to base 2; ours are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from ... import cuda_build
from ...context import LayerStore, Scoring, StepContext
from ...layout import PageLayout
from .. import operations
from .._cuda import StepIndices, fallback
from .._flashinfer import Prefill, Shape, Wrappers, flashinfer, plan_prefill, workspaces
from ..decode.cuda import decode_stored

WORKSPACE_BYTES = 64 << 20
"""Keys and values of one part as 16-bit floats: 16,384 tokens of Llama 3 8B's layer. Larger parts are not faster:
each is a whole prefill kernel."""


class ExtendPlan:
    """As the twin. FlashInfer plans once for all layers of one shape, with the first of them; nothing waits where the
    host knows how long the contexts are (StepContext.stored_tokens), else the first run does. No index is looked at."""

    def __init__(self, step: StepContext, new_tokens: Sequence[int], bounds: LayerStore | None = None) -> None:
        self._step, self._new_tokens = step, new_tokens
        self._indices = StepIndices(step)
        self._prefills: dict[Shape, Prefill | None] = {}

    @cached_property
    def _stored_tokens(self) -> Sequence[int]:
        """Each request's stored tokens. Where nobody on the host knew them, the step's one wait for the device."""
        if self._step.stored_tokens is not None:
            return self._step.stored_tokens
        return (self._step.packed_tokens + self._step.frame_tokens).tolist()

    @cached_property
    def _longest_tokens(self) -> int:
        return max((old + new for old, new in zip(self._stored_tokens, self._new_tokens, strict=True)), default=0)

    @cached_property
    def _wrappers(self) -> Wrappers:
        return workspaces(self._step.page_table.device).begin_step()

    @cached_property
    def _other(self) -> operations.ExtendPlan:
        return fallback("attend_extend", "ExtendPlan")(self._step, self._new_tokens)

    def run(
        self,
        query_rot: torch.Tensor,
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the twin, in query_rot's precision."""
        prefill = None
        if expressible(query_rot, layer.layout, scoring, self._longest_tokens):
            prefill = self._prefill(query_rot, layer.layout, scoring)
        if prefill is None:
            return self._other.run(query_rot, key_rot, value_rot, layer, scoring)
        out_rot, lse = _run(prefill.new, query_rot, key_rot, value_rot)
        for part in prefill.parts:
            sides = decode_stored(part.requests, part.positions, self._indices, layer, query_rot.dtype)
            found = _run(part.wrapper, query_rot[part.rows], *sides)
            out_rot[part.rows], lse[part.rows] = flashinfer().merge_state(out_rot[part.rows], lse[part.rows], *found)
        return out_rot, lse * math.log(2)

    def _prefill(self, query_rot: torch.Tensor, layout: PageLayout, scoring: Scoring) -> Prefill | None:
        """None where FlashInfer would need more plans than there may be."""
        shape = Shape(
            query_rot.shape[1], layout.num_kv_heads, layout.head_dim, query_rot.dtype, scoring.scale, scoring.soft_cap
        )
        if shape not in self._prefills:
            token_bytes = layout.num_kv_heads * layout.head_dim * 2 * query_rot.element_size()
            room_tokens = max(1, WORKSPACE_BYTES // token_bytes)
            self._prefills[shape] = plan_prefill(
                self._wrappers, shape, self._new_tokens, self._stored_tokens, room_tokens
            )
        return self._prefills[shape]


def _run(wrapper: object, *sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query, key and value rows of what the wrapper is planned for -> out_rot, lse to base 2."""
    dtype = sides[0].dtype
    return wrapper.run(*(side.to(dtype).contiguous() for side in sides), return_lse=True, lse_base="log2")


def expressible(query_rot: torch.Tensor, layout: PageLayout, scoring: Scoring, longest_tokens: int) -> bool:
    """Whether FlashInfer's kernels can do it. A window that hides anything cannot be said of a part: FlashInfer takes
    the last key for the last query's own. Some request's whole context is `longest_tokens` long, new ones included."""
    hides = scoring.window_left is not None and scoring.window_left < longest_tokens - 1
    known = query_rot.dtype in (torch.float16, torch.bfloat16) and layout.head_dim in cuda_build.HEAD_DIMS
    return known and not hides
