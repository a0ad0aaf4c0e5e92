"""What every backend offers: the operations' signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..context import LayerStore, Scoring, StepContext
from ..layout import PageLayout
from ..token_writes import TokenWrites

if TYPE_CHECKING:
    from ..basis import Basis


class DecodePlan(Protocol):
    """One query for each request of a step, planned for all layers (ops/attend_decode/reference.py)."""

    def run(
        self,
        query_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
        basis: Basis | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query_rot [B, Hq, D] -> out_rot [B, Hq, D] in its dtype, lse [B, Hq] float32. With a basis out has left it:
        basis.Basis.leave, which alone uses sink_logits [Hq]."""


class ExtendPlan(Protocol):
    """A step's new tokens, planned for all layers (ops/attend_extend/reference.py)."""

    def run(
        self,
        query_rot: torch.Tensor,
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query_rot [T, Hq, D], key_rot, value_rot [T, H, D] -> out_rot [T, Hq, D] in query_rot's dtype, lse [T, Hq]
        float32."""


class Operations(Protocol):
    """A backend's operations, for tensors on one device. Each is defined in its folder's reference.py."""

    @property
    def shares_reads(self) -> bool:
        """Whether attention makes use of StepContext.shared."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> its orthonormal Hadamard transform, in x's dtype."""

    def enter(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, basis: Basis
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query [T, Hq, d], key, value [T, H, d] -> query_rot [T, Hq, D], key_rot, value_rot [T, H, D], each in its
        dtype."""

    def encode(
        self,
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        page_ids: torch.Tensor,
        tile_ids: torch.Tensor,
        pages: torch.Tensor,
        layout: PageLayout,
        key_shaping: torch.Tensor | None = None,
    ) -> None:
        """key_rot, value_rot [N, H, 16, D] float: whole tiles into `pages`, which is written."""

    def decode(
        self, pages: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """page_ids [N] int -> key_rot, value_rot [N, H, P, D] float32."""

    def store_tokens(
        self, key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites, store: LayerStore
    ) -> None:
        """key_rot, value_rot [T, H, D] float: a step's new tokens of one layer; the store's tensors are written."""

    def plan_decode(self, step: StepContext, bounds: LayerStore | None = None) -> DecodePlan:
        """Once a step. `bounds` is one of the layers, with sinks if any layer has them, and all others hold as many
        pages, frames and sinks: where kernels read by a step's indices unchecked, the plan checks them all against it.
        None: each run checks its own, as far as its window sees. Raises ValueError for an index that leaves the store.

        Compiled kernels alone need it: on a GPU a look at indices would wait for it, and torch checks for itself.
        """

    def plan_extend(self, step: StepContext, new_tokens: Sequence[int], bounds: LayerStore | None = None) -> ExtendPlan:
        """As `plan_decode`; new_tokens [B]: how many each request brings."""

    def scratch_bytes(self, layouts: Sequence[PageLayout], context_tokens: int) -> int:
        """What kernels allocate beside their arguments and results, at most (ops.scratch_bytes)."""
