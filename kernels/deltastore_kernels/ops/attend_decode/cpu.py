"""attend_decode in C++: integer dot products over the packed codes (csrc/cpu/attend_segment.cpp)."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING

import torch

from ... import _checks, native
from ..._abi import ScoringC
from ...context import LayerStore, Scoring, StepContext
from .._cpu import StepView, outputs

if TYPE_CHECKING:
    from ...basis import Basis


class DecodePlan:
    """As the twin; a step's indices are checked and shown to C once."""

    def __init__(self, step: StepContext, bounds: LayerStore | None = None) -> None:
        self._view = StepView(step, bounds)

    def run(
        self,
        query_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
        basis: Basis | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the twin; over packed pages the query and the weights are rounded to 8 bits on the way
        (tests/budgets.py: BACKEND_ATTEND_INT8)."""
        _checks.require_queries(query_rot, layer.layout)
        query = query_rot.float().contiguous()
        out_rot, lse = outputs(query)
        refusal = native.library().deltastore_attend_decode(
            byref(self._view.of_rows(layer, len(query))),
            byref(ScoringC.of(scoring)),
            query.data_ptr(),
            query.shape[1],
            out_rot.data_ptr(),
            lse.data_ptr(),
            torch.get_num_threads(),
        )
        native.check(refusal)
        out_rot = out_rot.to(query_rot.dtype)
        if basis is not None:
            out_rot = basis.leave(out_rot, lse, query_rot, scoring, sink_logits)
        return out_rot, lse
