"""Small tensors between host and device without a wait.

A copy from pageable memory stops the host until the device has done everything before it, and so does a copy to the
host. From and to pinned memory nobody waits; torch keeps a pinned block until the copies that use it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory."""
    return tensor.pin_memory()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`."""
    return tensor if device.type == "cpu" else pinned(tensor).to(device, non_blocking=True)


def all_to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one dtype on the host -> the same on `device`, by one copy."""
    if device.type == "cpu":
        return list(tensors)
    packed = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
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
