"""enter: a step's queries, keys and values of one layer into its stored basis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ...basis import Basis


def enter(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, basis: Basis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [T, Hq, d], key, value [T, H, d], of any float dtype and any strides -> query_rot [T, Hq, D], key_rot,
    value_rot [T, H, D], each in its dtype."""
    return basis.rotate_query(query), basis.rotate_key(key), basis.rotate_value(value)
