"""What does not work, measured, and what each step of our codec brings.

`methods()` are negative results of the DeltaStore reports as methods, and our codec step by step. What the reports say
of keys, values and attention themselves is in `figures`.

Several methods learn from the very sequence they compress (means, codebooks, bases): names say "of the
sequence". What they learn has a fixed size, so its share falls with the length; `bits_per_value`
leaves it out and each docstring gives it.

Legend: B sequences, H KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from deltastore_kernels import codec

from . import published
from .method import Method
from .peers import FP16_BITS, RAW, Codec, Part, absmax, by_group, fp16, hadamard, minmax, nearest_level

_SMALLEST = 2.0**-40  # as the codec's: keeps log2 finite for all-zero vectors

# --- negative results of the reports ---


@dataclass(frozen=True)
class LowRank:
    """SVD of a head's keys, and of its values, over the sequence: the first `rank` directions, factors quantized
    to `bits` absmax-symmetric. The basis [rank, D] is left out of the bits: rank * bits / T more."""

    rank: int
    bits: int = 4
    source: str = "published"

    @property
    def name(self) -> str:
        return f"SVD of the sequence, rank {self.rank}, {self.bits}-bit factors"

    def bits_per_value(self, head_dim: int) -> float:
        return (self.bits * self.rank + FP16_BITS) / head_dim

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._one(key), self._one(value)

    def _one(self, x: Tensor) -> Tensor:
        left, size, right = torch.linalg.svd(x, full_matrices=False)
        rank = min(self.rank, size.shape[-1])
        weights = left[..., :rank] * size[..., None, :rank]  # [B, H, T, rank]
        return absmax(weights, self.bits) @ absmax(right[..., :rank, :], self.bits)


@dataclass
class CrossLayerDelta:
    """A layer's keys and values as their difference from what the layer below decoded, by `codec`.

    The one method that remembers between calls: the layer below, of the same forward pass. Layer 0 starts anew.
    """

    codec: Codec
    source: str = "published"
    _below: tuple[int, Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"deltas between layers, {self.codec.name}"

    def bits_per_value(self, head_dim: int) -> float:
        return self.codec.bits_per_value(head_dim)

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == 0:
            decoded = self.codec.apply(0, key, value)
        else:
            if self._below is None or self._below[0] != layer - 1 or self._below[1].shape != key.shape:
                raise ValueError(f"{self.name}: layer {layer} must follow layer {layer - 1} of the same tokens")
            _, below_key, below_value = self._below
            key_delta, value_delta = self.codec.apply(layer, key - below_key, value - below_value)
            decoded = below_key + key_delta, below_value + value_delta
        self._below = (layer, *decoded)
        return decoded


@dataclass(frozen=True)
class VectorQuantization:
    """One codebook of 256 vectors of `block` neighbouring channels for a layer's keys, one for its values, both
    k-means of up to 8,192 blocks of the sequence itself (10 rounds, seed 0). The codebook is left out: 4096 * block
    / (H T D) more bits."""

    block: int
    source: str = "published"

    @property
    def name(self) -> str:
        return f"VQ block {self.block}, codebook of the sequence"

    def bits_per_value(self, head_dim: int) -> float:
        return 8 / self.block

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._one(key), self._one(value)

    def _one(self, x: Tensor) -> Tensor:
        points = x.reshape(-1, self.block)
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).to(points.device)
        codebook = kmeans(points[order[:8192]], min(256, len(points)), rounds=10)
        return fp16(codebook)[nearest(points, codebook)].view(x.shape)


def kmeans(points: Tensor, centroids: int, rounds: int) -> Tensor:
    """points [N, d] in random order -> centroids [C, d] by Lloyd's algorithm from the first C; empty ones stay."""
    found = points[:centroids].clone()
    for _ in range(rounds):
        owner = nearest(points, found)
        counts = owner.bincount(minlength=centroids)[:, None]
        sums = torch.zeros_like(found).index_add_(0, owner, points)
        found = torch.where(counts > 0, sums / counts.clamp_min(1), found)
    return found


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """points [N, d], centroids [C, d] -> index of the nearest [N], in chunks that bound the memory."""
    half_norms = centroids.square().sum(-1) / 2
    return torch.cat([(chunk @ centroids.T - half_norms).argmax(-1) for chunk in points.split(16_384)])


def per_channel(key_bits: int, value_bits: int, group: int) -> Codec:
    """Keys and values per channel, asymmetric, over `group` tokens."""
    key, value = (
        Part(partial(minmax, bits=bits), bits, 2 * FP16_BITS, group, axis="tokens") for bits in (key_bits, value_bits)
    )
    return Codec(f"per channel asymmetric K{key_bits}V{value_bits} g{group}", "published", key, value)


def asymmetric_rotated(key_bits: int, value_bits: int, group: int = 64) -> Codec:
    """Hadamard per head, then asymmetric codes per token over `group` channels."""
    key, value = (
        Part(partial(minmax, bits=bits), bits, 2 * FP16_BITS, group, rotation=hadamard)
        for bits in (key_bits, value_bits)
    )
    return Codec(f"asymmetric rotated K{key_bits}V{value_bits} g{group}", "published", key, value)


def three_bit_keys(rotated: bool) -> Codec:
    """3-bit absmax-symmetric keys per token and head, values untouched: what the keys alone cost."""
    key = Part(partial(absmax, bits=3), 3, FP16_BITS, 64, rotation=hadamard if rotated else None)
    return Codec(f"naive 3-bit keys, {'rotated' if rotated else 'not rotated'}, V raw", "published", key, RAW)


# --- the steps of our codec ---


@dataclass(frozen=True)
class Steps:
    """Our codec in float arithmetic, each step a switch; with all of them on, what the packed store decodes.

    The key mean of the sequence is left out of the bits (16 / T a value of K), as are raw sinks.
    """

    name: str
    key_bits: int = 4
    value_bits: int = 2
    rotated: bool = True
    """Hadamard per head."""
    lloyd_max: bool = True
    """The codec's levels, of least squared error for a Gaussian; else absmax-symmetric ones under float16 scales."""
    unbiased: bool = True
    """Value scales with <v, v_hat> = <v, v>; else of least squared error."""
    key_means: bool = True
    """Keys without their mean per channel over the tokens after the sinks, taken from the sequence itself."""
    sink_tokens: int = 4
    """First tokens kept raw."""
    scales: str = "nibble"
    """"fp16", "8-bit" (8 steps an octave), or "nibble" (16 steps of 3/8 octave below a tile's largest)."""
    source: str = "ours"

    def bits_per_value(self, head_dim: int) -> float:
        # nibble: 4 bits a vector and an 8-bit anchor for a tile of 16; absmax has float16 scales
        scale_bits = {"fp16": 16, "8-bit": 8, "nibble": 4 + 8 / 16}[self.scales if self.lloyd_max else "fp16"]
        return (self.key_bits + self.value_bits) / 2 + scale_bits / head_dim

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._one(key, self.key_bits, is_key=True), self._one(value, self.value_bits, is_key=False)

    def _one(self, x: Tensor, bits: int, is_key: bool) -> Tensor:
        packed = x[..., self.sink_tokens :, :]
        if not packed.shape[-2]:
            return x
        mean = packed.mean(-2, keepdim=True) if is_key and self.key_means else torch.zeros_like(packed[..., :1, :])
        rotation = hadamard(x.shape[-1]).to(x) if self.rotated else torch.eye(x.shape[-1]).to(x)
        packed_rot = (packed - mean) @ rotation
        if self.lloyd_max:
            decoded_rot = self._gaussian_codes(packed_rot, bits, unbiased=self.unbiased and not is_key)
        else:
            decoded_rot = absmax(packed_rot, bits)
        return torch.cat((x[..., : self.sink_tokens, :], decoded_rot @ rotation.T + mean), -2)

    def _gaussian_codes(self, x: Tensor, bits: int, unbiased: bool) -> Tensor:
        """x [..., T, D] -> decoded. Codes are chosen after the scale's rounding and make up for it."""
        levels = torch.tensor(codec.levels(bits)).to(x)
        rms = x.square().mean(-1, keepdim=True).sqrt().clamp_min(_SMALLEST)
        coded = nearest_level(x / rms, levels)
        if unbiased:
            wanted = x.square().sum(-1, keepdim=True) / (x * coded).sum(-1, keepdim=True).clamp_min(_SMALLEST)
            scale = round_scales(wanted, self.scales)
            return nearest_level(x * wanted / (rms * scale).clamp_min(_SMALLEST), levels) * scale
        if self.scales == "fp16":
            fitted = (x * coded).sum(-1, keepdim=True) / coded.square().sum(-1, keepdim=True)
            candidates = [round_scales(fitted, "fp16")]
        else:
            candidates = [round_scales(rms, self.scales, steps) for steps in (0, -1, 1)]
        tried = torch.stack([nearest_level(x / scale, levels) * scale for scale in candidates])
        errors = (tried - x).square().sum(-1, keepdim=True)
        return tried.take_along_dim(errors.argmin(0, keepdim=True), 0)[0]


def round_scales(scale: Tensor, kind: str, steps: int = 0) -> Tensor:
    """scale [..., T, 1] as it is stored, or `steps` steps of its grid larger; "fp16" has no steps."""
    if kind == "fp16":
        return fp16(scale).clamp_min(2.0**-24)
    log2_scale = scale.clamp_min(_SMALLEST).log2()
    if kind == "8-bit":
        return (((log2_scale * 8).round() + steps) / 8).exp2()

    def nibbles(tile: Tensor) -> Tensor:
        anchor = (tile.amax(-1, keepdim=True) * 8).round() / 8
        return anchor - ((anchor - tile) / 0.375).round().sub(steps).clamp(0, 15) * 0.375

    return by_group(log2_scale.transpose(-1, -2), 16, nibbles).transpose(-1, -2).exp2()


_CUMULATIVE = (
    ("no step: absmax, not rotated", {}),
    ("+ Hadamard", {"rotated": True}),
    ("+ Lloyd-Max", {"lloyd_max": True}),
    ("+ 4 raw sinks", {"sink_tokens": 4}),
    ("+ key means of the sequence", {"key_means": True}),
    ("+ unbiased value scales", {"unbiased": True}),
    ("+ 8-bit scales", {"scales": "8-bit"}),
    ("+ nibble scales = all steps", {"scales": "nibble"}),
)
_LEFT_OUT = (
    ("without Hadamard", {"rotated": False}),
    ("without Lloyd-Max (absmax)", {"lloyd_max": False}),
    ("without raw sinks", {"sink_tokens": 0}),
    ("without key means", {"key_means": False}),
    ("without unbiased value scales", {"unbiased": False}),
    ("with 8-bit scales", {"scales": "8-bit"}),
    ("with fp16 scales", {"scales": "fp16"}),
)


def steps(key_bits: int = 4, value_bits: int = 2) -> list[Steps]:
    """Our codec's steps, added one after the other, then each left out of the whole."""
    width = f"K{key_bits}V{value_bits}"
    whole = Steps("", key_bits, value_bits)
    row = replace(whole, rotated=False, lloyd_max=False, unbiased=False, key_means=False, sink_tokens=0, scales="fp16")
    rows = [row := replace(row, name=f"{width} {label}", **change) for label, change in _CUMULATIVE]
    return rows + [replace(whole, name=f"{width} all steps, {label}", **change) for label, change in _LEFT_OUT]


def methods() -> list[Method]:
    """Every ablation that is a method."""
    k4v2 = published.absmax(4, 2)
    return [
        k4v2,
        *(LowRank(rank) for rank in (32, 16)),
        CrossLayerDelta(k4v2),
        *(three_bit_keys(rotated) for rotated in (False, True)),
        *(VectorQuantization(block) for block in (8, 4, 2)),
        per_channel(4, 4, 32),
        per_channel(4, 2, 64),
        asymmetric_rotated(4, 2),
        *steps(),
    ]


#: what the reports claim for the rows above: name -> KL
CLAIMED = {
    LowRank(32).name: "> 2.0",
    LowRank(16).name: "> 2.0",
    three_bit_keys(False).name: "> 1.0",
    VectorQuantization(8).name: "2.17",
    VectorQuantization(4).name: "0.42",
    VectorQuantization(2).name: "0.03",
    per_channel(4, 4, 32).name: "0.005",
    per_channel(4, 2, 64).name: "0.048",
    asymmetric_rotated(4, 2).name: "0.03",
}


def labelled(method: Method) -> str:
    """A row's name, with the claimed KL where there is one."""
    claimed = CLAIMED.get(method.name)
    return f"{method.name} (claimed KL {claimed})" if claimed else method.name
