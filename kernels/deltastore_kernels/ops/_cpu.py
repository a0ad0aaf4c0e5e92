"""What the CPU's attention plans share: a step and a layer as the compiled kernels see them."""

from __future__ import annotations

from ctypes import byref
from operator import attrgetter

import torch

from .. import _checks, native
from .._abi import Context
from ..context import LayerStore, StepContext

_OF_LAYER = (
    "pages", "frame_key_rot", "frame_value_rot", "num_frames", "sink_key_rot", "sink_value_rot", "num_sinks",
    "sink_tokens",
)  # fmt: skip
_COUNTS = {
    "pages": attrgetter("pages.count"),
    "coarse pages": attrgetter("pages.coarse_count"),
    "frames": attrgetter("num_frames"),
    "sinks": attrgetter("num_sinks"),
}


class StepView:
    """The C view of a step, made once; `of` completes it for a layer.

    With `bounds` all indices are checked at once against that layer, whatever a window hides, and kernels do not look
    at them again. Raises ValueError where a request reads a page, frame or sink that is not there.
    """

    def __init__(self, step: StepContext, bounds: LayerStore | None) -> None:
        indices = (step.page_table, step.packed_tokens, step.frame_ids, step.frame_tokens, step.sink_ids)
        self.requests = len(step.packed_tokens)
        _checks.require_step(step)
        # Held as long as the view: C keeps no reference to a tensor.
        self._tensors = [native.int64_tensor(index) for index in indices]
        table, *others = self._tensors
        self._view = Context(batch=self.requests, page_table=table.data_ptr(), table_stride=table.shape[1])
        for name, tensor in zip(("packed_tokens", "frame_ids", "frame_tokens", "sink_ids"), others, strict=True):
            setattr(self._view, name, tensor.data_ptr())
        self._checked = None
        if bounds is not None:
            view = self.of(bounds)
            native.check(native.library().deltastore_check_context(byref(view)))
            self._checked = {what: count(view) for what, count in _COUNTS.items()}
            self._view.is_checked = 1

    def of(self, layer: LayerStore) -> Context:
        """For one layer, until the next call. Raises ValueError for a layer smaller than what was checked."""
        theirs = native.store_view(layer)
        for name in _OF_LAYER:
            setattr(self._view, name, getattr(theirs, name))
        for what, checked in (self._checked or {}).items():
            # A layer without sinks reads none, so no index of a sink matters there.
            if (count := _COUNTS[what](theirs)) < checked and (what != "sinks" or count):
                raise ValueError(
                    f"a layer with {count} {what} in a step whose indices were checked against {checked}: plan the "
                    "step with a layer as `bounds` that is as large as all others"
                )
        return self._view

    def of_rows(self, layer: LayerStore, requests: int) -> Context:
        """The same for the first `requests` requests."""
        if requests > self.requests:
            raise ValueError(f"queries of {requests} requests; the step has {self.requests}: give at most one for each")
        view = self.of(layer)
        view.batch = requests
        return view


def outputs(query_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query_rot [T, Hq, D] float32 -> unset out_rot [T, Hq, D] and lse [T, Hq] float32."""
    return torch.empty_like(query_rot), torch.empty(query_rot.shape[:2])
