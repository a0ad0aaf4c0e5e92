"""attend_extend through FlashInfer: its prefill kernels over new tokens and, part by part, over the decoded context.

    out = merge(new tokens over each other, causal;  new tokens over stored tokens of part 0;  of part 1; ..)

FlashInfer has no hook for loading keys and values, so stored tokens become 16-bit floats in a workspace of fixed size
first, never all at once. Its kernels give logarithms to base 2; ours are natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate

import torch

from ... import cuda_build
from ...context import PagedContext, Scoring
from .._cuda import fallback
from ..decode.cuda import decode_context

WORKSPACE_BYTES = 64 << 20
"""Keys and values of one part as 16-bit floats: 16,384 tokens of Llama 3 8B's layer. Larger parts are not faster:
each is a whole prefill kernel."""
FLASHINFER_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's documentation recommends for its own intermediate results."""


def attend_extend(
    query_rot: torch.Tensor,
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    new_tokens: list[int],
    context: PagedContext,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin, in query_rot's precision. Waits for the GPU once, to learn how long the contexts are."""
    stored = (context.packed_tokens + context.frame_tokens).tolist()
    longest = max((old + new for old, new in zip(stored, new_tokens, strict=True)), default=0)
    if not expressible(query_rot, context, scoring, longest):
        return fallback("attend_extend")(query_rot, key_rot, value_rot, new_tokens, context, scoring)
    attend = _Ragged(query_rot, context, scoring)
    out_rot, lse = attend(query_rot, new_tokens, key_rot, value_rot, new_tokens, causal=True)
    starts = [0, *accumulate(new_tokens)]
    layout = context.layout
    room_tokens = max(1, WORKSPACE_BYTES // (layout.num_kv_heads * layout.head_dim * 2 * query_rot.element_size()))
    for first, spans in parts(stored, room_tokens):
        counts = [end - begin for begin, end in spans]
        requests = torch.arange(first, first + len(spans), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        positions = torch.cat([torch.arange(begin, end, dtype=torch.int32) for begin, end in spans])
        device = query_rot.device
        sides = decode_context(requests.to(device), positions.to(device), context, query_rot.dtype)
        rows = slice(starts[first], starts[first + len(spans)])
        part = attend(query_rot[rows], new_tokens[first : first + len(spans)], *sides, counts, causal=False)
        out_rot[rows], lse[rows] = _flashinfer().merge_state(out_rot[rows], lse[rows], *part)
    return out_rot, lse * math.log(2)


def expressible(query_rot: torch.Tensor, context: PagedContext, scoring: Scoring, longest_tokens: int) -> bool:
    """Whether FlashInfer's kernels can do it. A window that hides anything cannot be said of a part: FlashInfer takes
    the last key for the last query's own. Some request's whole context is `longest_tokens` long, new ones included."""
    hides = scoring.window_left is not None and scoring.window_left < longest_tokens - 1
    known = query_rot.dtype in (torch.float16, torch.bfloat16) and context.layout.head_dim in cuda_build.HEAD_DIMS
    return known and not hides


def parts(stored_tokens: Sequence[int], room_tokens: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Cuts all requests' stored tokens into parts of at most `room_tokens`: the first request of a part, and for it and
    those after it the span of tokens. Every request of a part has tokens in it."""
    request, begin = 0, 0
    while request < len(stored_tokens):
        first, left, spans = request, room_tokens, []
        while request < len(stored_tokens) and left and stored_tokens[request]:
            end = min(stored_tokens[request], begin + left)
            spans.append((begin, end))
            left -= end - begin
            if end < stored_tokens[request]:
                begin = end
                break
            request, begin = request + 1, 0
        if spans:
            yield first, spans
        else:
            request += 1  # nothing is stored of this one


class _Ragged:
    """FlashInfer's ragged prefill with a layer's constants."""

    def __init__(self, query_rot: torch.Tensor, context: PagedContext, scoring: Scoring) -> None:
        self._wrapper = _wrapper(query_rot.device)
        heads = query_rot.shape[1], context.layout.num_kv_heads, context.layout.head_dim
        self._heads, self._scoring, self._dtype = heads, scoring, query_rot.dtype

    def __call__(
        self,
        query_rot: torch.Tensor,
        query_tokens: Sequence[int],
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        key_tokens: Sequence[int],
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of some requests, one after the other -> out_rot, lse to base 2."""
        self._wrapper.plan(
            _ends(query_tokens),
            _ends(key_tokens),
            *self._heads,
            causal=causal,
            sm_scale=self._scoring.scale,
            logits_soft_cap=self._scoring.soft_cap,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        sides = (side.to(self._dtype).contiguous() for side in (query_rot, key_rot, value_rot))
        return self._wrapper.run(*sides, return_lse=True, lse_base="log2")


def _ends(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(tokens)], dtype=torch.int32)


@cache
def _wrapper(device: torch.device) -> object:
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _flashinfer().BatchPrefillWithRaggedKVCacheWrapper(workspace, kv_layout="NHD")


def _flashinfer() -> object:
    try:
        import flashinfer
    except ImportError as error:
        raise cuda_build.CudaUnavailable(
            "extend over pages needs FlashInfer: pip install flashinfer-python; or use the Triton kernels"
        ) from error
    return flashinfer
