"""rotate: the orthonormal Hadamard transform of each head."""

from __future__ import annotations

from functools import lru_cache

import torch


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] -> H x / sqrt(D), D a power of two. Its own inverse; keeps dot products and norms.

    Spreads outlier channels over the head, so that what is left looks Gaussian (QuaRot,
    arXiv:2404.00456, section 3). Computed in float32, returned in x's dtype.
    """
    head_dim = x.shape[-1]
    assert head_dim & (head_dim - 1) == 0, f"head_dim={head_dim} is no power of two"
    return (x.float() @ hadamard(head_dim, x.device)).to(x.dtype)


@lru_cache
@torch.inference_mode(False)
def hadamard(head_dim: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix: H(2n) = [[H, H], [H, -H]], scaled to orthonormal."""
    signs = torch.ones(1, 1, device=device)
    while len(signs) < head_dim:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs * head_dim**-0.5
