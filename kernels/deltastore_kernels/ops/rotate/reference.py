"""rotate: the orthonormal Hadamard transform of each head, in blocks of powers of two."""

from __future__ import annotations

from functools import lru_cache

import torch


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] -> x times `hadamard(D)`. Its own inverse; keeps dot products and norms.

    Spreads outlier channels over the head, so that what is left looks Gaussian (QuaRot,
    arXiv:2404.00456, section 3). Computed in float32, returned in x's dtype.
    """
    return (x.float() @ hadamard(x.shape[-1], x.device)).to(x.dtype)


@lru_cache
@torch.inference_mode(False)
def hadamard(head_dim: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix where head_dim is a power of two: H(2n) = [[H, H], [H, -H]], scaled to orthonormal. Else a
    block of it for each power of two that head_dim is the sum of, the largest first."""
    if len(blocks := block_dims(head_dim)) > 1:
        return torch.block_diag(*(hadamard(block, device) for block in blocks))
    signs = torch.ones(1, 1, device=device)
    while len(signs) < head_dim:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs * head_dim**-0.5


def block_dims(head_dim: int) -> list[int]:
    """The powers of two that head_dim is the sum of, the largest first."""
    return [1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1]
