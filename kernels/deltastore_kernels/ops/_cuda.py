"""What the CUDA operations share: a context as the arguments of csrc/cuda/binding.cu, and what else can do the work."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

from ..context import PagedContext

MOST_SINK_TOKENS = 16
"""A sink is attended to as one tile."""


def context_tensors(context: PagedContext) -> tuple[torch.Tensor, ...]:
    """In the order of binding.cu: context_of. Index tensors that are int32 are taken as they are."""
    if context.sinks is None:
        sinks = context.frame_key_rot[:0], context.frame_key_rot[:0], context.frame_ids[:0]
    else:
        sinks = context.sinks.key_rot, context.sinks.value_rot, context.sinks.ids
    return (
        context.pages,
        _index(context.page_table),
        _index(context.packed_tokens),
        context.frame_key_rot,
        context.frame_value_rot,
        _index(context.frame_ids),
        _index(context.frame_tokens),
        *sinks[:2],
        _index(sinks[2]),
    )


def context_numbers(context: PagedContext) -> tuple[int, int, int]:
    """KV heads, tokens per page, tokens of a sink."""
    sink_tokens = 0 if context.sinks is None else context.sinks.key_rot.shape[2]
    if sink_tokens > MOST_SINK_TOKENS:
        raise ValueError(f"{sink_tokens} sink tokens: the CUDA kernels take at most {MOST_SINK_TOKENS}")
    return context.layout.num_kv_heads, context.layout.page_tokens, sink_tokens


def _index(indices: torch.Tensor) -> torch.Tensor:
    return indices.to(torch.int32).contiguous()


def fallback(operation: str) -> Callable:
    """The Triton operation, or the reference's, for what the CUDA kernels do not do."""
    modules = (f"{__package__}.{operation}.{module}" for module in ("triton", "reference"))
    return getattr(import_module(next(filter(find_spec, modules))), operation)
