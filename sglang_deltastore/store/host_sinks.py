"""Sinks in host memory, beside the pages that go there: all layers' bytes of each beginning's, for as many as fit."""

from __future__ import annotations

from collections import OrderedDict

import torch

from deltastore_kernels.packing import RAW_DTYPE

from .pages import PageStore
from .sinks import Beginning


class HostSinks:
    """The second level of a store's SinkTable: `capacity` sinks, of which the one that was kept or asked for longest
    ago makes room. Copies run in the order of the device's own work, and nobody waits for them."""

    def __init__(self, store: PageStore, capacity: int) -> None:
        self._tensors = [*store.sink_key_rot, *store.sink_value_rot]
        self._sizes = [tensor[0].numel() if len(tensor) else 0 for tensor in self._tensors]
        on_gpu = store.stored[0].pages.is_cuda
        self._rows = torch.empty(max(capacity, 1), sum(self._sizes), dtype=RAW_DTYPE, pin_memory=on_gpu)
        self._row_of: OrderedDict[Beginning, int] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def keep(self, beginning: Beginning, sink: int) -> None:
        row = self._row_of.pop(beginning, None)
        if row is None:
            is_full = len(self._row_of) == len(self._rows)
            row = self._row_of.popitem(last=False)[1] if is_full else len(self._row_of)
        self._row_of[beginning] = row
        whole = torch.cat([tensor[sink].flatten() for tensor in self._tensors if len(tensor)])
        self._rows[row].copy_(whole, non_blocking=True)

    def bring_back(self, beginning: Beginning, sink: int) -> bool:
        if beginning not in self._row_of:
            return False
        self._row_of.move_to_end(beginning)
        parts = self._rows[self._row_of[beginning]].split(self._sizes)
        for tensor, part in zip(self._tensors, parts, strict=True):
            if len(tensor):
                tensor[sink].copy_(part.view(tensor.shape[1:]), non_blocking=True)
        return True

    def clear(self) -> None:
        self._row_of.clear()
