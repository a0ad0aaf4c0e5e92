"""The basis in which one layer's keys and values are stored.

    key_rot   = (key - mean) R        query_rot = query R^-T
    value_rot = value V               out       = out_rot V^-1

Every stored key lacks the same mean, whose score q . mean is then the same for every token of a
query and cancels in the softmax: attention needs no correction. What does not cancel: a term of the
softmax that is no token's (`missing_score`).

V is the Hadamard matrix. So is R without calibration, and the mean is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .ops.operations import Operations
from .ops.rotate.reference import hadamard

WHITENING = 0.5
"""Keys are multiplied by covariance ** (-WHITENING / 2): 0 keeps their shape, 1 makes it a ball. Half-way
measured best (kernels/DECISIONS.md): wide directions get finer steps, narrow ones still fewer of them."""

QUERY_FLOOR = 0.01
"""Share of the mean added to every eigenvalue of the queries' second moment, so that no direction is free: a
direction without any weight would collect all rounding errors, and calibration has not seen every query."""

_VARIANCE_FLOOR = 1e-3  # of the mean variance of a head's keys: keeps the inverse bounded


@dataclass(frozen=True)
class KeyBasis:
    """A layer's calibrated key basis; float32, R above for each KV head.

    mean [H, D], rotation [H, D, D], query_rotation [H, D, D] (R^-T), shaping [H, D, D]
    (`ops/encode/reference.py: _shaped`).
    """

    mean: torch.Tensor
    rotation: torch.Tensor
    query_rotation: torch.Tensor
    shaping: torch.Tensor

    def to(self, device: str | torch.device) -> KeyBasis:
        return KeyBasis(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def fit_key_basis(mean: torch.Tensor, covariance: torch.Tensor, query_moment: torch.Tensor) -> KeyBasis:
    """The basis for keys of this mean [H, D] and covariance [H, D, D], and queries of this second moment
    [H, D, D] (all heads of the group, as attention sees them).

    R = c covariance^(-WHITENING / 2) Hadamard, with c keeping the keys' mean square. Shaping is the triangular
    factor M of the queries' moment in that basis, W = M^T M. With fine codes the error that queries see then
    goes with det(covariance query_moment)^(1 / D) instead of the product of their traces (classical transform
    coding gain, with noise shaping in place of a bit for each channel); coarse codes get a part of it.
    """
    head_dim = mean.shape[-1]
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    mean_variance = eigenvalues.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    powers = eigenvalues.clamp_min(0).add(_VARIANCE_FLOOR * mean_variance) ** (-WHITENING / 2)
    whitened = (powers.square() * eigenvalues.clamp_min(0)).mean(-1, keepdim=True)
    powers = powers * (mean_variance / whitened.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    turn = hadamard(head_dim, mean.device).double()
    rotation = (vectors * powers[:, None]) @ vectors.mT @ turn
    inverse = turn @ (vectors / powers[:, None]) @ vectors.mT  # the Hadamard matrix is its own inverse
    moment = inverse @ query_moment.double() @ inverse.mT
    strength = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    moment = moment / strength + QUERY_FLOOR * torch.eye(head_dim, dtype=moment.dtype, device=moment.device)
    # Cholesky of the moment with its dims reversed, reversed back: W = U U^T with U upper triangular.
    factor = torch.linalg.cholesky(moment.flip(-1, -2)).flip(-1, -2).mT
    diagonal = torch.diagonal(factor, dim1=-2, dim2=-1)
    shaping = (factor / diagonal[..., None]).tril(-1) + torch.diag_embed(diagonal)
    tensors = (mean, rotation, inverse.mT, shaping)
    return KeyBasis(*(tensor.float().contiguous() for tensor in tensors))


def plain_key_basis(heads: int, head_dim: int, device: torch.device) -> KeyBasis:
    """What storing without calibration does, as a key basis: no mean, the Hadamard matrix, each dim rounded by
    itself."""
    turn = hadamard(head_dim, device).float().expand(heads, -1, -1).contiguous()
    one = torch.eye(head_dim, device=device).expand(heads, -1, -1).contiguous()
    return KeyBasis(torch.zeros(heads, head_dim, device=device), turn, turn, one)


class Basis:
    """Into a layer's stored basis and back. Tensors are [T, heads, D] in, and out, of any float dtype."""

    def __init__(self, ops: Operations, key_basis: KeyBasis | None = None) -> None:
        self._rotate = ops.rotate
        self._key = key_basis
        if key_basis is not None:
            self._key = replace(key_basis, shaping=_as_encode_reads_it(key_basis.shaping))
            self._inverse = key_basis.query_rotation.mT.contiguous()
            self._rotated_mean = (key_basis.mean[:, None] @ key_basis.rotation)[:, 0]

    @property
    def key_shaping(self) -> torch.Tensor | None:
        """What `encode` takes, [H, D, D] float32, as its kernels for this device want it in memory."""
        return None if self._key is None else self._key.shaping

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """query [T, Hq, D] -> query_rot; query head h reads KV head h // (Hq / H)."""
        return self._rotate(query) if self._key is None else _by_head(query, self._key.query_rotation)

    def rotate_key(self, key: torch.Tensor) -> torch.Tensor:
        """key [T, H, D] -> key_rot, without its mean."""
        if self._key is None:
            return self._rotate(key)
        return (_by_head(key.float(), self._key.rotation) - self._rotated_mean).to(key.dtype)

    def rotate_value(self, value: torch.Tensor) -> torch.Tensor:
        """value [T, H, D] -> value_rot."""
        return self._rotate(value)

    def missing_score(self, query: torch.Tensor) -> torch.Tensor | float:
        """query [T, Hq, D] -> [T, Hq] float32: what the dot product with every stored key lacks, q . mean."""
        if self._key is None:
            return 0.0
        heads = len(self._key.mean)
        grouped = query.float().unflatten(1, (heads, -1))
        return torch.einsum("thgd,hd->thg", grouped, self._key.mean).flatten(1)

    def restore_key(self, key_rot: torch.Tensor) -> torch.Tensor:
        """key_rot [T, H, D] -> key, with its mean."""
        if self._key is None:
            return self._rotate(key_rot)
        return (_by_head(key_rot.float(), self._inverse) + self._key.mean).to(key_rot.dtype)

    def restore_value(self, value_rot: torch.Tensor) -> torch.Tensor:
        """value_rot [T, H, D] -> value; and out_rot [T, Hq, D] -> out."""
        return self._rotate(value_rot)


def _as_encode_reads_it(shaping: torch.Tensor) -> torch.Tensor:
    """The same matrices: by rows for the compiled kernels, by columns for a GPU's, which follow one dim's error to all
    later dims (ops/encode/triton.py). Laid out once, or each call would copy them."""
    return shaping.contiguous() if shaping.device.type == "cpu" else shaping.mT.contiguous().mT


def _by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """x [T, H * G, D], matrices [H, D, D] -> x times its group's matrix, in float32, returned in x's dtype."""
    tokens, query_heads, head_dim = x.shape
    heads = len(matrices)
    group = query_heads // heads
    grouped = x.float().view(tokens, heads, group, head_dim).transpose(0, 1)
    turned = grouped.reshape(heads, tokens * group, head_dim) @ matrices
    return turned.view(heads, tokens, group, head_dim).transpose(0, 1).reshape(x.shape).to(x.dtype)
