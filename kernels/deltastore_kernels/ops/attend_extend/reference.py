"""attend_extend: new tokens over the stored context and over each other, causally."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...context import LayerStore, Scoring, StepContext
from .._attention import attend_rows, stored_context


class ExtendPlan:
    """A step's requests and how many tokens each brings [B], for every layer. Here there is nothing to plan, and torch
    checks indices where they are used.

    bounds: see ops/operations.py.
    """

    def __init__(self, step: StepContext, new_tokens: Sequence[int], bounds: LayerStore | None = None) -> None:
        self._step, self._new_tokens = step, new_tokens

    def run(
        self,
        query_rot: torch.Tensor,
        key_rot: torch.Tensor,
        value_rot: torch.Tensor,
        layer: LayerStore,
        scoring: Scoring,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of T new tokens, the B requests' one after the other.

        query_rot [T, Hq, D], key_rot, value_rot [T, H, D] float (the new tokens themselves, not yet stored), T the sum
        of new_tokens. Hq = H * group: query head h reads KV head h // group.
        Returns out_rot [T, Hq, D] in query_rot's dtype and lse [T, Hq] float32 (natural logarithm).
        """
        out_rot = torch.empty_like(query_rot)
        lse = query_rot.new_empty(query_rot.shape[:2], dtype=torch.float32)
        begin = 0
        for request, count in enumerate(self._new_tokens):
            rows = slice(begin, begin + count)
            old_key, old_value = stored_context(self._step, layer, request, scoring.window_left)
            keys = torch.cat((old_key, key_rot[rows].transpose(0, 1).float()), dim=1)
            values = torch.cat((old_value, value_rot[rows].transpose(0, 1).float()), dim=1)
            out_rot[rows], lse[rows] = attend_rows(query_rot[rows], keys, values, scoring)
            begin += count
        return out_rot, lse
