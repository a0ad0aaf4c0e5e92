"""Sinks in host memory, beside the pages that go there: all layers' bytes of each beginning's, for as many as fit."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import torch

from deltastore_kernels.packing import RAW_DTYPE

from .pages import PageStore
from .sinks import Beginning


class HostSinks:
    """The second level of a store's SinkTable: `capacity` sinks, of which the one that was kept or asked for longest
    ago makes room. Copies from and to the device run in the order of its own work, and nobody waits for them but
    `read` and `put`, the way to a storage and back, which any thread may call."""

    def __init__(self, store: PageStore, capacity: int) -> None:
        self._tensors = [*store.sink_key_rot, *store.sink_value_rot]
        self._sizes = [tensor[0].numel() if len(tensor) else 0 for tensor in self._tensors]
        device = store.stored[0].pages.device.type
        self._rows = torch.empty(max(capacity, 1), sum(self._sizes), dtype=RAW_DTYPE, pin_memory=device != "cpu")
        self._row_of: OrderedDict[Beginning, int] = OrderedDict()
        #: of each row, when the device has last read or written it
        self._copied = [torch.get_device_module(device).Event() for _ in self._rows]
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    @property
    def sink_bytes(self) -> int:
        return self._rows[0].nbytes

    def keep(self, beginning: Beginning, sink: int) -> None:
        with self._lock:
            row = self._row_for(beginning)
            whole = torch.cat([tensor[sink].flatten() for tensor in self._tensors if len(tensor)])
            self._rows[row].copy_(whole, non_blocking=True)
            self._copied[row].record()

    def bring_back(self, beginning: Beginning, sink: int) -> bool:
        with self._lock:
            if beginning not in self._row_of:
                return False
            self._row_of.move_to_end(beginning)
            row = self._row_of[beginning]
            for tensor, part in zip(self._tensors, self._rows[row].split(self._sizes), strict=True):
                if len(tensor):
                    tensor[sink].copy_(part.view(tensor.shape[1:]), non_blocking=True)
            self._copied[row].record()
            return True

    def read(self, beginning: Beginning) -> torch.Tensor | None:
        """A sink's bytes [sink_bytes] uint8, or None where it is not here."""
        with self._lock:
            row = self._row_of.get(beginning)
        if row is None:
            return None
        self._copied[row].synchronize()  # without the lock, which the scheduler may want
        with self._lock:
            is_here = self._row_of.get(beginning) == row and self._copied[row].query()
            return self._rows[row].view(torch.uint8).clone() if is_here else None

    def put(self, beginning: Beginning, sink_bytes: torch.Tensor) -> None:
        """What `read` gave, in this process or another. A sink that is here stays: its sequences have been read so."""
        with self._lock:
            if beginning not in self._row_of:
                row = self._row_for(beginning)
                self._copied[row].synchronize()
                self._rows[row].view(torch.uint8).copy_(sink_bytes)

    def clear(self) -> None:
        with self._lock:
            self._row_of.clear()

    def _row_for(self, beginning: Beginning) -> int:
        row = self._row_of.pop(beginning, None)
        if row is None:
            is_full = len(self._row_of) == len(self._rows)
            row = self._row_of.popitem(last=False)[1] if is_full else len(self._row_of)
        self._row_of[beginning] = row
        return row
