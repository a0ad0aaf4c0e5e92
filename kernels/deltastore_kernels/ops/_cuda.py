"""What the CUDA operations share: a step and a layer as the arguments of csrc/cuda/binding.cu, and what else can do the
work."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..context import LayerStore, StepContext

MOST_SINK_TOKENS = 16
"""A sink is attended to as one tile."""


class StepIndices:
    """A step's index tensors as the kernels read them, int32 in one piece: converted once, not once a layer."""

    def __init__(self, step: StepContext) -> None:
        self._page_table, self._packed_tokens, self._frame_ids, self._frame_tokens, self._sink_ids = (
            index.to(torch.int32).contiguous()
            for index in (step.page_table, step.packed_tokens, step.frame_ids, step.frame_tokens, step.sink_ids)
        )
        self.table_pages = step.page_table.shape[1]

    def tensors(self, layer: LayerStore) -> tuple[torch.Tensor, ...]:
        """With a layer's, in the order of binding.cu: context_of."""
        return (
            layer.pages,
            self._page_table,
            self._packed_tokens,
            layer.frame_key_rot,
            layer.frame_value_rot,
            self._frame_ids,
            self._frame_tokens,
            layer.sink_key_rot,
            layer.sink_value_rot,
            self._sink_ids,
        )


def layer_numbers(layer: LayerStore) -> tuple[int, int, int]:
    """KV heads, tokens per page, tokens of a sink (0: the layer has none)."""
    if layer.sink_tokens > MOST_SINK_TOKENS:
        raise ValueError(
            f"{layer.sink_tokens} sink tokens: the CUDA kernels take at most {MOST_SINK_TOKENS}; use the Triton kernels"
        )
    return layer.layout.num_kv_heads, layer.layout.page_tokens, layer.sink_tokens


def fallback(folder: str, name: str) -> Any:
    """The Triton operation, or the reference's, for what the CUDA kernels do not do."""
    modules = (f"{__package__}.{folder}.{module}" for module in ("triton", "reference"))
    return getattr(import_module(next(filter(find_spec, modules))), name)
