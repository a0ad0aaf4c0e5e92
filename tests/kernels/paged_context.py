"""Requests' stored tokens in one layer, step and layer in one piece, so that a test can change a part of either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deltastore_kernels.context import CoarsePages, LayerStore, Scoring, SharedPrefix, StepContext
from deltastore_kernels.layout import PageLayout


@dataclass(frozen=True)
class Sinks:
    """key_rot, value_rot [slots, H, S, D] float16; ids [B] int, the slot of a request's sequence, -1: it has none."""

    key_rot: torch.Tensor
    value_rot: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class PagedContext:
    """Fields as in StepContext and LayerStore. sinks None: there are none."""

    layout: PageLayout
    pages: torch.Tensor
    page_table: torch.Tensor
    packed_tokens: torch.Tensor
    frame_key_rot: torch.Tensor
    frame_value_rot: torch.Tensor
    frame_ids: torch.Tensor
    frame_tokens: torch.Tensor
    sinks: Sinks | None = None
    shared: SharedPrefix | None = None
    stored_tokens: list[int] | None = None
    coarse: CoarsePages | None = None

    def spoil(self, page_ids: torch.Tensor) -> None:
        """Pages of a page table [N]: nothing that they hold is of use."""
        self.pages[page_ids[page_ids >= 0]] = 255
        if self.coarse:
            self.coarse.pages[page_ids[page_ids < 0]] = 255

    @property
    def step(self) -> StepContext:
        sink_ids = torch.full_like(self.frame_ids, -1) if self.sinks is None else self.sinks.ids
        return StepContext(
            self.page_table, self.packed_tokens, self.frame_ids, self.frame_tokens, sink_ids, self.shared,
            self.stored_tokens,
        )  # fmt: skip

    @property
    def layer(self) -> LayerStore:
        frames = self.frame_key_rot, self.frame_value_rot
        sinks = [frame[:0] for frame in frames] if self.sinks is None else [self.sinks.key_rot, self.sinks.value_rot]
        return LayerStore(self.layout, self.pages, *frames, *sinks, coarse=self.coarse)


def run_decode(
    operations: Any, query_rot: torch.Tensor, context: PagedContext, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of one layer: the plan and its run, no index looked at before it. `operations` may be an operation's
    module, too."""
    return _of(operations, "plan_decode", "DecodePlan")(context.step).run(query_rot, context.layer, scoring)


def run_extend(
    operations: Any,
    query_rot: torch.Tensor,
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    new_tokens: list[int],
    context: PagedContext,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `run_decode`."""
    plan = _of(operations, "plan_extend", "ExtendPlan")(context.step, new_tokens)
    return plan.run(query_rot, key_rot, value_rot, context.layer, scoring)


def _of(operations: Any, name: str, class_name: str) -> Any:
    return getattr(operations, name, None) or getattr(operations, class_name)
