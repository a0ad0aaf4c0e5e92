"""Peers of 2026 that are more than two `peers.Part`s: vector and trellis codes, tiles with two scales, learned turns.

Tokens that these projects keep raw (sinks, a window of the newest) are left out of rows and bits alike, as KIVI's are.

Legend: B sequences, H KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deltastore_kernels.basis import KeyBasis

from ..policy.calibration import Calibration
from .method import Method
from .peers import FP16_BITS, Codec, Part, fp16, hadamard, lloyd_max, minmax, unit_codebook
from .trellis import bitshift

_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Peer:
    """A `Method` of two functions, (layer, x [B, H, T, D]) -> decoded, and its bits by head_dim."""

    name: str
    keys: Callable[[int, Tensor], Tensor]
    values: Callable[[int, Tensor], Tensor]
    bits: Callable[[int], float]
    source: str = "peer"

    def bits_per_value(self, head_dim: int) -> float:
        return self.bits(head_dim)

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys(layer, key), self.values(layer, value)


# --- TCQ ---


def tcq(bits: int) -> Codec:
    """buun-llama-cpp's turbo2_tcq and turbo3_tcq: unit vectors of at most 128 channels, Hadamard, a bitshift trellis of
    256 windows at 2 bits and 512 at 3, the norm in float16. Its tables are trained and published; ours are trained the
    same way for a Gaussian. Paths begin in state 0, so no bits are spent on a first state."""

    def quantize(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        unit = (x / norm.clamp_min(_SMALLEST) * x.shape[-1] ** 0.5).flatten(0, -2)[None]
        code = bitshift(bits, bits + 6)
        codes, _ = code.encode(unit, torch.ones(unit.shape[:-1]))
        return code.decode(codes)[0].view(x.shape) * x.shape[-1] ** -0.5 * fp16(norm)

    part = Part(quantize, bits, FP16_BITS, 128, rotation=hadamard)
    return Codec(f"TCQ (buun-llama-cpp), {bits} bits", "peer", part, part)


# --- E8 ---


def nexusquant(key_bits: int, value_bits: int) -> Codec:
    """NexusQuant (core/e8_lattice.py, per head): Hadamard, scale = max |x| / 2^(bits - 1) in float16, eight channels at
    a time to the nearest point of its relaxed E8: whole numbers of even sum, or halves of any. The points in reach are
    stored by their number, in whole bits: 18 for eight channels at 2 bits, 26 at 3."""
    key, value = (
        Part(partial(relaxed_e8, reach=2 ** (bits - 1)), {2: 18 / 8, 3: 26 / 8}[bits], FP16_BITS, rotation=hadamard)
        for bits in (key_bits, value_bits)
    )
    return Codec(f"NexusQuant E8 K{key_bits}V{value_bits}", "peer", key, value)


def relaxed_e8(x: Tensor, reach: int) -> Tensor:
    """x [..., D] -> its nearest points; coordinates are at most `reach` scales."""
    scale = fp16(x.abs().amax(-1, keepdim=True) / reach).clamp_min(_SMALLEST)
    blocks = (x / scale).clamp(-reach, reach).unflatten(-1, (-1, 8))
    whole = blocks.round()
    gap = blocks - whole
    farthest = torch.nn.functional.one_hot(gap.abs().argmax(-1), 8)
    step = torch.where(gap >= 0, 1.0, -1.0)
    step = torch.where((whole + step).abs() > reach, -step, step)
    even = torch.where(whole.sum(-1, keepdim=True) % 2 != 0, whole + farthest * step, whole)
    halves = ((blocks - 0.5).round() + 0.5).clamp(0.5 - reach, reach - 0.5)
    nearer = (halves - blocks).square().sum(-1, keepdim=True) < (even - blocks).square().sum(-1, keepdim=True)
    return torch.where(nearer, halves, even).flatten(-2) * scale


# --- KVarN ---

_TILE_TOKENS = 128


def kvarn(key_bits: int, value_bits: int) -> Peer:
    """KVarN (arXiv:2606.03458; presets of its vLLM branch, groups of 128 tokens): Hadamard; a tile's channels and
    tokens are brought to one standard deviation in turn, 16 times; then keys are asymmetric per channel and values per
    token. Scale and least value take up one side's factors, the other's are stored: float16, all three."""

    def keys(layer: int, x: Tensor) -> Tensor:
        return _by_tile(x, lambda tile: balanced(tile.mT, key_bits).mT)

    def values(layer: int, x: Tensor) -> Tensor:
        return _by_tile(x, lambda tile: balanced(tile, value_bits))

    def bits(head_dim: int) -> float:
        by_channel, by_token = FP16_BITS / _TILE_TOKENS, FP16_BITS / head_dim
        return (key_bits + value_bits) / 2 + 1.5 * (by_channel + by_token)

    return Peer(f"KVarN K{key_bits}V{value_bits} g{_TILE_TOKENS}", keys, values, bits)


def _by_tile(x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    turn = hadamard(x.shape[-1])
    return torch.cat([quantize(tile) for tile in (x @ turn).split(_TILE_TOKENS, -2)], -2) @ turn.T


def balanced(tile: Tensor, bits: int, rounds: int = 16) -> Tensor:
    """tile [..., rows, columns], asymmetric by row after the scaling of rows and columns that leaves their standard
    deviations most alike; of those tried, the first included."""
    rows, columns = torch.zeros_like(tile[..., :1]), torch.zeros_like(tile[..., :1, :])  # logarithms
    best = (_imbalance(tile), rows, columns)
    for _ in range(rounds):
        columns = (columns + _log_std(tile / (rows + columns).exp(), -2)).clamp(-0.3, 10)
        rows = (rows + _log_std(tile / (rows + columns).exp(), -1)).clamp(-0.3, 10)
        found = (_imbalance(tile / (rows + columns).exp()), rows, columns)
        better = found[0] <= best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    _, rows, columns = best
    column_scale = fp16(columns.exp())
    return minmax(tile / columns.exp(), bits) * column_scale


def _log_std(x: Tensor, dim: int) -> Tensor:
    return x.std(dim, correction=0, keepdim=True).clamp(1e-3, 1e3).log()


def _imbalance(x: Tensor) -> Tensor:
    """Largest over least standard deviation, of columns and of rows together [..., 1, 1]."""
    stds = (x.std(dim, correction=0).clamp_min(1e-8) for dim in (-2, -1))
    return sum(std.amax(-1) / std.amin(-1) for std in stds)[..., None, None]


# --- LBQ ---

_CHUNK_TOKENS = 256


def lbq(key_bits: int, value_bits: int) -> Peer:
    """Lifeboat's LBQ, as its documents describe it (the code is not public): keys without their mean over a chunk of
    tokens, Hadamard, Lloyd-Max levels under a norm for each vector; norms and means in float16. Chunks of 256 tokens
    are our reading."""

    def keys(layer: int, x: Tensor) -> Tensor:
        chunks = x.split(_CHUNK_TOKENS, -2)
        means = [fp16(chunk.mean(-2, keepdim=True)) for chunk in chunks]
        return torch.cat([_coded(chunk - mean, key_bits) + mean for chunk, mean in zip(chunks, means, strict=True)], -2)

    def bits(head_dim: int) -> float:
        return (key_bits + value_bits) / 2 + FP16_BITS / head_dim + FP16_BITS / _CHUNK_TOKENS / 2

    return Peer(f"LBQ K{key_bits}V{value_bits} (Lifeboat)", keys, lambda _, x: _coded(x, value_bits), bits)


def _coded(x: Tensor, bits: int) -> Tensor:
    turn = hadamard(x.shape[-1])
    return unit_codebook(x @ turn, lloyd_max(bits) * x.shape[-1] ** -0.5) @ turn.T


# --- OSCAR ---

_CLIPPED_AT = 0.96


def oscar(calibration: Calibration) -> Peer:
    """OSCAR's INT2 (arXiv:2605.17757; oscar_rotation_clip_int2_kv.py): keys in the eigenvectors of the queries' second
    moment, values in those of their own covariance, of each head, then Hadamard; a vector is clipped at the size that
    0.96 of its channels do not exceed, then asymmetric, scale and zero in float16. The queries' moments are our
    calibration's; the values' covariance is that of the sequence, without the weights of their scores."""

    def keys(layer: int, x: Tensor) -> Tensor:
        return _clipped_int2(x, torch.linalg.eigh(query_moments(calibration.layers[layer])).eigenvectors)

    def values(layer: int, x: Tensor) -> Tensor:
        heads = x.transpose(0, 1).flatten(1, 2)
        return _clipped_int2(x, torch.linalg.eigh(heads.mT @ heads).eigenvectors)

    return Peer("OSCAR INT2", keys, values, lambda head_dim: 2 + 2 * FP16_BITS / head_dim)


def query_moments(basis: KeyBasis) -> Tensor:
    """[H, D, D], of each head up to its size: from the shaping, which is their factor in the stored basis."""
    strength = torch.diagonal(basis.shaping, dim1=-2, dim2=-1)
    factor = basis.shaping.tril(-1) * strength[..., None] + torch.diag_embed(strength)
    seen = factor @ basis.rotation.mT
    return seen.mT @ seen


def _clipped_int2(x: Tensor, vectors: Tensor) -> Tensor:
    """x [B, H, T, D], vectors [H, D, D] orthonormal."""
    turn = vectors @ hadamard(x.shape[-1])
    rotated = x @ turn
    bound = rotated.abs().sort(-1).values[..., int(_CLIPPED_AT * x.shape[-1])].unsqueeze(-1)
    return minmax(rotated.clamp(-bound, bound), 2) @ turn.mT


def methods(calibration: Calibration | None = None) -> list[Method]:
    """All of them; OSCAR's needs what a calibration knows of the queries."""
    found: list[Method] = [tcq(3), tcq(2)]
    found += [nexusquant(*bits) for bits in ((3, 3), (3, 2), (2, 2))]
    found += [kvarn(*bits) for bits in ((4, 4), (4, 2), (2, 2))]
    found += [lbq(*bits) for bits in ((4, 4), (4, 2), (2, 2))]
    return [*found, oscar(calibration)] if calibration else found
