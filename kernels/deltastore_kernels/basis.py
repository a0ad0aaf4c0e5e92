"""The basis in which one layer's keys and values are stored.

    key_rot   = R_k (key - mean)        query_rot = R_k^-T query
    value_rot = R_v value               out       = R_v^-1 out_rot

Every stored key lacks the same mean, whose score q . mean is then the same for every token of a
query and cancels in the softmax: attention needs no correction.

Without calibration the rotations are Hadamard matrices and the mean is zero.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


class Basis:
    """Into a layer's stored basis and back. Tensors are [T, heads, D] in, and out, of any float dtype."""

    def __init__(self, ops: SimpleNamespace) -> None:
        self._rotate = ops.rotate

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """query [T, Hq, D] -> query_rot."""
        return self._rotate(query)

    def rotate_key(self, key: torch.Tensor) -> torch.Tensor:
        """key [T, H, D] -> key_rot, without its mean."""
        return self._rotate(key)

    def rotate_value(self, value: torch.Tensor) -> torch.Tensor:
        """value [T, H, D] -> value_rot."""
        return self._rotate(value)

    def restore_key(self, key_rot: torch.Tensor) -> torch.Tensor:
        """key_rot [T, H, D] -> key, with its mean."""
        return self._rotate(key_rot)

    def restore_value(self, value_rot: torch.Tensor) -> torch.Tensor:
        """value_rot [T, H, D] -> value; and out_rot [T, Hq, D] -> out."""
        return self._rotate(value_rot)
