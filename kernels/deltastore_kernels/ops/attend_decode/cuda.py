"""attend_decode in CUDA: integer products over packed codes on tensor cores (csrc/cuda/attend_decode.cuh)."""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch

from ... import cuda_build
from ...context import LayerStore, Scoring, StepContext
from .. import operations
from .._cuda import StepIndices, fallback, layer_numbers
from .._triton_leave import leave

if TYPE_CHECKING:
    from ...basis import Basis

HEADS_OF_BLOCK = 8
"""Query heads of one KV head that a thread block serves (csrc/cuda/attend_state.cuh: kHeads)."""
BLOCKS_OF_MULTIPROCESSOR = 3
"""Thread blocks wanted for each multiprocessor: what fits at once at head_dim 128."""
FEWEST_TOKENS_OF_SPLIT = 512
"""Four warps of two blocks of 64 tokens: with fewer, the merge costs more than the split saves."""


class DecodePlan:
    """As the twin. Waits for nothing, and launches the same grid for all contexts of one page table's shape, so a CUDA
    graph may hold it. Indices of other types than int32 cost a conversion each, once a step. StepContext.shared is not
    used, and no index is looked at."""

    def __init__(self, step: StepContext, bounds: LayerStore | None = None) -> None:
        self._step = step
        self._indices = StepIndices(step)
        self._splits: dict[int, int] = {}

    @cached_property
    def _other(self) -> operations.DecodePlan:
        return fallback("attend_decode", "DecodePlan")(self._step)

    def run(
        self,
        query_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
        basis: Basis | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the twin; over packed pages queries and weights are rounded to 16 bits on the way (tests/budgets.py:
        BACKEND_ATTEND_INT16)."""
        layout = layer.layout
        if layout.head_dim not in cuda_build.HEAD_DIMS:
            return self._other.run(query_rot, layer, scoring, basis, sink_logits)
        query_rot = query_rot.contiguous()
        batch, query_heads, head_dim = query_rot.shape
        blocks = batch * layout.num_kv_heads * -(-query_heads // layout.num_kv_heads // HEADS_OF_BLOCK)
        if (splits := self._splits.get(blocks)) is None:
            table_tokens = self._indices.table_pages * layout.page_tokens
            splits = self._splits[blocks] = count_splits(blocks, table_tokens, _multiprocessors(query_rot.device))
        partial_out = query_rot.new_empty((batch, query_heads, splits, head_dim), dtype=torch.float32)
        partial_log2 = partial_out.new_empty((batch, query_heads, splits))
        cuda_build.load(cuda_build.Kernels(layout.format, head_dim)).attend_decode(
            query_rot,
            *self._indices.tensors(layer),
            partial_out,
            partial_log2,
            *layer_numbers(layer),
            -1 if scoring.window_left is None else scoring.window_left,
            scoring.scale,
            scoring.soft_cap,
        )
        return leave(partial_out, partial_log2, query_rot, scoring, basis, sink_logits)


def count_splits(blocks: int, table_tokens: int, multiprocessors: int) -> int:
    """Into how many parts each request's context is cut: enough that `blocks` (one for each request and KV head)
    fill the GPU, and no more than the longest context that the page table holds is worth."""
    wanted = -(-BLOCKS_OF_MULTIPROCESSOR * multiprocessors // max(blocks, 1))
    return max(1, min(wanted, table_tokens // FEWEST_TOKENS_OF_SPLIT))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
