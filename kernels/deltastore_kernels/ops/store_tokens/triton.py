"""store_tokens on a GPU: the definition's torch operations around Triton's encode."""

from __future__ import annotations

import torch

from ...context import LayerStore
from ...token_writes import TokenWrites
from ..encode.triton import encode
from .reference import store_with


def store_tokens(key_rot: torch.Tensor, value_rot: torch.Tensor, writes: TokenWrites, store: LayerStore) -> None:
    """As the twin; nothing waits, and no shape depends on a value."""
    store_with(encode, key_rot, value_rot, writes, store)
