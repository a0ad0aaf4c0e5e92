"""Small tensors between host and device without a wait.

A copy from pageable memory stops the host until the device has done everything before it, and so does a copy to the
host. From and to pinned memory nobody waits; torch keeps a pinned block until the copies that use it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one dtype on the host -> the same on `device`, moved by one copy that nothing waits for."""
    if device.type == "cpu":
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class ToHost:
    """A device tensor on its way to the host. `arrived` says whether `tensor` may be read; nothing waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self.tensor = tensor
            return
        self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.tensor.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    @property
    def arrived(self) -> bool:
        return self._event is None or self._event.query()
