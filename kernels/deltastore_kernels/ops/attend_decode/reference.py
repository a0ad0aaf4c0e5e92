"""attend_decode: one query for each request over its stored context."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...context import LayerStore, Scoring, StepContext
from .._attention import attend_rows, stored_context

if TYPE_CHECKING:
    from ...basis import Basis


class DecodePlan:
    """A step's requests, for every layer. Here there is nothing to plan, and torch checks indices where they are used.

    bounds: see ops/operations.py.
    """

    def __init__(self, step: StepContext, bounds: LayerStore | None = None) -> None:
        self._step = step

    def run(
        self,
        query_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
        basis: Basis | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query_rot [B, Hq, D], each the last token of its request's context (already stored).

        Returns out_rot [B, Hq, D] in query_rot's dtype, or with a basis out [B, Hq, d], which has left it
        (`Basis.leave`), and lse [B, Hq] float32 (natural logarithm).
        Reads the requests' own pages only, and of those only what the window shows.
        """
        out_rot = torch.empty_like(query_rot)
        lse = query_rot.new_empty(query_rot.shape[:2], dtype=torch.float32)
        for request in range(len(query_rot)):
            row = slice(request, request + 1)
            # The query's own token is the last one stored, so the window reaches one token less far.
            keys, values = stored_context(self._step, layer, request, scoring.window_left, includes_query=True)
            out_rot[row], lse[row] = attend_rows(query_rot[row], keys, values, scoring)
        if basis is not None:
            out_rot = basis.leave(out_rot, lse, query_rot, scoring, sink_logits)
        return out_rot, lse
