"""What attend_extend's backends find out once a step, for all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

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
