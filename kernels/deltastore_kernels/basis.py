"""The basis in which one layer's keys and values are stored.

    key_rot   = (key - mean) R        query_rot = query R^-T
    value_rot = value V               out       = out_rot V^-1

Every stored key lacks the same mean, whose score q . mean is then the same for every token of a
query and cancels in the softmax: attention needs no correction. What does not cancel: a term of the
softmax that is no token's (`missing_score`).

V is the Hadamard matrix. So is R without calibration, and the mean is zero. A head that is stored in more dims than
the model's gets zeros first, in queries, keys and values alike (`spread`): the turn shares the dims' power out over all
that are stored, and what rounding adds to the zeros is gone after turning back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from .context import Scoring
from .layout import PageLayout
from .ops.rotate.reference import hadamard
from .sink_logits import apply_sink_logits

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
    tensors = (mean, rotation, inverse.mT, _shaping(_rotated(query_moment, inverse)))
    return KeyBasis(*(tensor.float().contiguous() for tensor in tensors))


def staleness(basis: KeyBasis, query_moment: torch.Tensor) -> torch.Tensor:
    """What queries of this second moment [H, D, D] see of the errors of keys stored in `basis`, over what they would
    see were the basis fitted to them; [H] float64, 1 and more.

    Shaping leads the error e of a key so that L e = u, with L the rows of M over their diagonal and u what rounding
    alone does to each dim, of the same variance in all. Queries see tr(W L^-1 L^-T) of it: least where L is the
    factor of their own W = M^T M, and then the sum of M_ii^2.
    """
    factor = _factor(_rotated(query_moment, basis.query_rotation.double().mT))
    through = torch.linalg.solve_triangular(basis.shaping.double(), factor, upper=False, left=False, unitriangular=True)
    seen: torch.Tensor = through.square().sum((-2, -1))
    return seen / torch.diagonal(factor, dim1=-2, dim2=-1).square().sum(-1)


def _rotated(query_moment: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """A second moment of queries [H, D, D] by R^-1 float64, brought to a mean square of 1, no direction without any."""
    moment = inverse @ query_moment.double() @ inverse.mT
    strength = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-30)
    return moment / strength + QUERY_FLOOR * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)


def _factor(moment: torch.Tensor) -> torch.Tensor:
    """W [H, D, D] positive definite -> the lower triangular M with W = M^T M."""
    # Cholesky of the moment with its dims reversed, reversed back: W = U U^T with U upper triangular.
    upper: torch.Tensor = torch.linalg.cholesky(moment.flip(-1, -2)).flip(-1, -2)
    return upper.mT


def _shaping(moment: torch.Tensor) -> torch.Tensor:
    """[H, D, D] positive definite -> `KeyBasis.shaping`."""
    factor = _factor(moment)
    diagonal = torch.diagonal(factor, dim1=-2, dim2=-1)
    below: torch.Tensor = (factor / diagonal[..., None]).tril(-1)
    return below + torch.diag_embed(diagonal)


def plain_key_basis(heads: int, head_dim: int, device: torch.device) -> KeyBasis:
    """What storing without calibration does, as a key basis: no mean, the Hadamard matrix, each dim rounded by
    itself."""
    turn = hadamard(head_dim, device).float().expand(heads, -1, -1).contiguous()
    one = torch.eye(head_dim, device=device).expand(heads, -1, -1).contiguous()
    return KeyBasis(torch.zeros(heads, head_dim, device=device), turn, turn, one)


def widened(basis: KeyBasis, head_dim: int) -> KeyBasis:
    """A basis that was fitted in the model's own dims, for keys and queries that were `spread` over head_dim.

    Errors in the dims between, where no query has anything, cost QUERY_FLOOR, as in every direction of no query.
    """
    heads, key_dim = basis.mean.shape
    if key_dim == head_dim:
        return basis
    narrow, wide = (hadamard(dim, basis.mean.device).double() for dim in (key_dim, head_dim))
    places = _places(key_dim, head_dim, basis.mean.device)
    between = torch.eye(head_dim, dtype=torch.float64, device=basis.mean.device)
    between[places, places] = 0

    def embedded(matrices: torch.Tensor, elsewhere: float) -> torch.Tensor:
        whole = (elsewhere * between).expand(heads, -1, -1).clone()
        whole[:, places[:, None], places] = matrices
        return whole

    diagonal = torch.diagonal(basis.shaping, dim1=1, dim2=2).double()
    factor = basis.shaping.double().tril(-1) * diagonal[..., None] + torch.diag_embed(diagonal)
    moment = wide @ embedded(narrow @ factor.mT @ factor @ narrow, QUERY_FLOOR) @ wide
    return KeyBasis(
        spread(basis.mean, head_dim),
        (embedded(basis.rotation.double() @ narrow, 1) @ wide).float(),
        (embedded(basis.query_rotation.double() @ narrow, 1) @ wide).float(),
        _shaping(moment).float(),
    )


def spread(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """x [..., d] -> [..., head_dim]: the same numbers in order, with zeros evenly between them, so that each block of
    the Hadamard matrix gets its part of both."""
    if x.shape[-1] == head_dim:
        return x
    wide = x.new_zeros(*x.shape[:-1], head_dim)
    wide[..., _places(x.shape[-1], head_dim, x.device)] = x
    return wide


def gathered(wide: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `spread`."""
    return wide if wide.shape[-1] == dim else wide[..., _places(dim, wide.shape[-1], wide.device)]


@lru_cache
@torch.inference_mode(False)
def _places(dim: int, head_dim: int, device: torch.device) -> torch.Tensor:
    return torch.arange(dim, device=device) * head_dim // dim


class Rotates(Protocol):
    """A backend's operations, as far as a basis is made of them (ops/operations.py)."""

    @property
    def rotate(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


class Basis:
    """Into a layer's stored basis and back. Tensors are [T, heads, d] in the model's dims, [T, heads, D] in the stored
    ones, of any float dtype. Where a step's time counts, `ops.enter` does all of a layer's at once.

    layout        of the layer's pages, where the two may differ
    key_basis     given in the model's dims, kept in the stored ones; None: not calibrated
    rotated_mean  [H, D] float32, of calibrated keys
    """

    def __init__(self, ops: Rotates, key_basis: KeyBasis | None = None, layout: PageLayout | None = None) -> None:
        self._rotate = ops.rotate
        self.layout = layout
        self.key_basis = key_basis
        if key_basis is not None:
            key_basis = widened(key_basis, layout.head_dim if layout else key_basis.mean.shape[-1])
            self.key_basis = replace(key_basis, shaping=_as_encode_reads_it(key_basis.shaping))
            self._inverse = key_basis.query_rotation.mT.contiguous()
            self.rotated_mean = (key_basis.mean[:, None] @ key_basis.rotation)[:, 0]

    @property
    def key_shaping(self) -> torch.Tensor | None:
        """What `encode` takes, [H, D, D] float32, as its kernels for this device want it in memory."""
        return None if self.key_basis is None else self.key_basis.shaping

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """query [T, Hq, d] -> query_rot; query head h reads KV head h // (Hq / H)."""
        query = self._spread(query)
        return self._rotate(query) if self.key_basis is None else _by_head(query, self.key_basis.query_rotation)

    def rotate_key(self, key: torch.Tensor) -> torch.Tensor:
        """key [T, H, d] -> key_rot, without its mean."""
        key = self._spread(key)
        if self.key_basis is None:
            return self._rotate(key)
        return (_by_head(key.float(), self.key_basis.rotation) - self.rotated_mean).to(key.dtype)

    def rotate_value(self, value: torch.Tensor) -> torch.Tensor:
        """value [T, H, d] -> value_rot."""
        return self._rotate(self._spread(value))

    def missing_score(self, query_rot: torch.Tensor) -> torch.Tensor | float:
        """query_rot [T, Hq, D] -> [T, Hq] float32: what the dot product with every stored key lacks, q . mean, which
        is query_rot . rotated_mean."""
        if self.key_basis is None:
            return 0.0
        grouped = query_rot.float().unflatten(1, (len(self.rotated_mean), -1))
        return torch.einsum("thgd,hd->thg", grouped, self.rotated_mean).flatten(1)

    def restore_key(self, key_rot: torch.Tensor) -> torch.Tensor:
        """key_rot [T, H, D] -> key, with its mean."""
        if self.key_basis is None:
            key = self._rotate(key_rot)
        else:
            key = (_by_head(key_rot.float(), self._inverse) + self.key_basis.mean).to(key_rot.dtype)
        return gathered(key, self.layout.key_dim) if self.layout else key

    def restore_value(self, value_rot: torch.Tensor) -> torch.Tensor:
        """value_rot [T, H, D] -> value; and out_rot [T, Hq, D] -> out."""
        value = self._rotate(value_rot)
        return gathered(value, self.layout.value_dim) if self.layout else value

    def leave(
        self,
        out_rot: torch.Tensor,
        lse: torch.Tensor,
        query_rot: torch.Tensor,
        scoring: Scoring,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """What attention gives for query_rot [T, Hq, D], out_rot [T, Hq, D] and lse [T, Hq], with the model's learned
        sinks where it has them, [Hq] -> out [T, Hq, d]."""
        if sink_logits is not None:
            out_rot = apply_sink_logits(out_rot, lse + scoring.scale * self.missing_score(query_rot), sink_logits)
        return self.restore_value(out_rot)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        return spread(x, self.layout.head_dim) if self.layout else x


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
