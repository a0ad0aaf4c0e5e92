"""rotate in C++ (csrc/cpu/rotate_rows.cpp): a fast Walsh-Hadamard transform."""

from __future__ import annotations

import torch

from ... import native
from ...layout import HEAD_DIMS
from . import reference


def rotate(x: torch.Tensor) -> torch.Tensor:
    """As the twin, with sums in another order. The result is contiguous."""
    if x.dtype not in native.FLOAT_TYPES or x.shape[-1] not in HEAD_DIMS:
        return reference.rotate(x)
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    out = native.rotate(rows if rows.stride(-1) == 1 else rows.contiguous())
    return out if x.dim() == 3 else out.view(x.shape)
