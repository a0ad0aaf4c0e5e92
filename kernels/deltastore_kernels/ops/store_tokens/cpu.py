"""store_tokens in C++ (csrc/cpu/store_tokens.cpp): one call for each layer and step."""

from __future__ import annotations

import torch

from ... import native
from ...context import LayerStore
from ...token_writes import TokenWrites


def store_tokens(key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites, store: LayerStore) -> None:
    """As the twin; codes as `encode` in C++ chooses them."""
    native.store_tokens(_rows(key_rot), _rows(value_rot), writes, store)


def _rows(x: torch.Tensor) -> torch.Tensor:
    x = x if x.dtype in native.FLOAT_TYPES else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
