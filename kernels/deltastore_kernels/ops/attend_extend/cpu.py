"""attend_extend in C++: as attend_decode over the stored tokens, in float32 over the new ones
(csrc/cpu/attend_segment.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int64

import torch

from ... import _checks, native
from ..._abi import ScoringC
from ...context import LayerStore, Scoring, StepContext
from .._cpu import StepView, outputs


class ExtendPlan:
    """As the twin; a step's indices are checked and shown to C once."""

    def __init__(self, step: StepContext, new_tokens: Sequence[int], bounds: LayerStore | None = None) -> None:
        if min(new_tokens, default=0) < 0:
            raise ValueError(f"new_tokens {list(new_tokens)}; must be 0 or more each")
        self._view = StepView(step, bounds)
        self._total = sum(new_tokens)
        self._requests = len(new_tokens)
        self._new_tokens = (c_int64 * self._requests)(*new_tokens)

    def run(
        self,
        query_rot: torch.Tensor,
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the twin; over packed pages the query and the weights are rounded to 8 bits on the way
        (tests/budgets.py: BACKEND_ATTEND_INT8)."""
        _checks.require_new_tokens(self._total, query_rot, key_rot, value_rot, layer.layout)
        query, key, value = (rows.float().contiguous() for rows in (query_rot, key_rot, value_rot))
        out_rot, lse = outputs(query)
        refusal = native.library().deltastore_attend_extend(
            byref(self._view.of_rows(layer, self._requests)),
            byref(ScoringC.of(scoring)),
            query.data_ptr(),
            query.shape[1],
            key.data_ptr(),
            value.data_ptr(),
            self._new_tokens,
            out_rot.data_ptr(),
            lse.data_ptr(),
            torch.get_num_threads(),
        )
        native.check(refusal)
        return out_rot if query_rot.dtype is torch.float32 else out_rot.to(query_rot.dtype), lse
