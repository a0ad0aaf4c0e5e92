"""decode in CUDA (csrc/cuda/decode_context.cuh)."""

from __future__ import annotations

import torch

from ... import cuda_build
from ...context import LayerStore, StepContext
from ...layout import PageLayout
from .._cuda import StepIndices, fallback, layer_numbers


def decode(pages: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin, but for the rounding of a scale's 2**x (tests/budgets.py: BACKEND_DECODE)."""
    if layout.head_dim not in cuda_build.HEAD_DIMS:
        return fallback("decode", "decode")(pages, page_ids, layout)
    tokens = len(page_ids) * layout.page_tokens
    nothing = torch.empty(0, layout.num_kv_heads, 16, layout.head_dim, dtype=torch.float16, device=pages.device)
    zero = torch.zeros(1, dtype=torch.int32, device=pages.device)
    step = StepContext(page_ids[None], torch.full_like(zero, tokens), frame_ids=zero, frame_tokens=zero, sink_ids=zero)
    layer = LayerStore(layout, pages, nothing, nothing, nothing, nothing)
    positions = torch.arange(tokens, dtype=torch.int32, device=pages.device)
    sides = decode_stored(torch.zeros_like(positions), positions, StepIndices(step), layer, torch.float32)
    key_rot, value_rot = (side.unflatten(0, (len(page_ids), layout.page_tokens)).transpose(1, 2) for side in sides)
    return key_rot, value_rot


def decode_stored(
    requests: torch.Tensor, positions: torch.Tensor, step: StepIndices, layer: LayerStore, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored token positions[i] of request requests[i] (int32), wherever it is: in a sink, a page or a frame.

    Returns key_rot, value_rot [len(positions), H, D] of `dtype` (float32, float16 or bfloat16).
    """
    layout = layer.layout
    key_rot = torch.empty(len(positions), layout.num_kv_heads, layout.head_dim, dtype=dtype, device=layer.pages.device)
    value_rot = torch.empty_like(key_rot)
    module = cuda_build.load(cuda_build.Kernels(layout.format, layout.head_dim))
    module.decode_context(requests, positions, *step.tensors(layer), key_rot, value_rot, *layer_numbers(layer))
    return key_rot, value_rot
