"""What attend_extend's backends find out once a step, for all layers, and bring to the device without waiting."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from ..context import PagedContext

Made = TypeVar("Made")


def once_a_step(context: PagedContext, name: Hashable, make: Callable[[], Made]) -> Made:
    """make(), or what it gave to an earlier layer of the same step under that name."""
    if context.kept is None:
        return make()
    if name not in context.kept:
        context.kept[name] = make()
    return context.kept[name]


def stored_tokens(context: PagedContext) -> Sequence[int]:
    """Each request's stored tokens. Where nobody on the host knew them, the step's one wait for the device."""
    if context.stored_tokens is not None:
        return context.stored_tokens
    return once_a_step(context, "stored_tokens", lambda: (context.packed_tokens + context.frame_tokens).tolist())


def to_device(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting for it: from pinned memory, which torch keeps until the copy
    is done. From pageable memory the copy would wait for all that is queued before it."""
    if device.type == "cpu":
        return indices
    return pinned(indices).to(device, non_blocking=True)


def pinned(indices: torch.Tensor) -> torch.Tensor:
    return indices.pin_memory()
