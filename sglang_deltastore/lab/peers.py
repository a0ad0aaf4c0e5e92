"""Other projects' KV cache formats, from their papers and public definitions, as rows of the same table.

A `Codec` is two `Part`s, one for keys and one for values. A part is one rotation and one quantizer
over groups of channels or of tokens. Metadata is rounded to the width it is counted with.

Legend: B sequences, H KV heads, T tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor

from .method import Method

#: [..., group] -> what decoding gives back, same shape; the last axis shares its metadata
Quantizer = Callable[[Tensor], Tensor]

FP16_BITS = 16
_SMALLEST = 2.0**-24  # the smallest float16 above zero: a scale never divides by zero


# --- quantizers of one group ---


def fp16(x: Tensor) -> Tensor:
    """x as float16 metadata, back in float32; saturates."""
    return x.clamp(-65504, 65504).half().float()


def absmax(x: Tensor, bits: int) -> Tensor:
    """Symmetric, 2^bits - 1 levels: scale = max |x| / (2^(bits-1) - 1), a float16."""
    top = 2 ** (bits - 1) - 1
    scale = fp16(x.abs().amax(-1, keepdim=True) / top).clamp_min(_SMALLEST)
    return (x / scale).round().clamp(-top, top) * scale


def minmax(x: Tensor, bits: int) -> Tensor:
    """Asymmetric, 2^bits levels from the least to the greatest value; scale and least are float16."""
    low = fp16(x.amin(-1, keepdim=True))
    scale = fp16((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).clamp_min(_SMALLEST)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def minmax_zero_point(x: Tensor, bits: int, clip: float) -> Tensor:
    """Asymmetric with a whole zero point; the range holds 0 and is clipped to `clip` of itself."""
    low = clip * x.amin(-1, keepdim=True).clamp_max(0)
    high = clip * x.amax(-1, keepdim=True).clamp_min(0)
    scale = fp16((high - low) / (2**bits - 1)).clamp_min(_SMALLEST)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """x -> the nearest of `levels` (ascending, [N])."""
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def unit_codebook(x: Tensor, levels: Tensor, renormalize: bool = False) -> Tensor:
    """Norm (float16) times the nearest levels of the unit vector; `renormalize` makes those a unit vector again."""
    norm = x.norm(dim=-1, keepdim=True)
    unit = nearest_level(x / norm.clamp_min(_SMALLEST), levels)
    if renormalize:
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST)
    return unit * fp16(norm)


def e4m3(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """8-bit floats: 4 bits of exponent, 3 of mantissa, at most 448 times `scale`."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


#: 4-bit floats: 2 bits of exponent, 1 of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)
E2M1 = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e2m1(x: Tensor, scale: Tensor) -> Tensor:
    """4-bit floats times `scale` [..., 1]; saturates at 6 times it."""
    return nearest_level(x / scale.clamp_min(_SMALLEST), E2M1) * scale


def e2m1_power_of_two(x: Tensor, round_exponent: Callable[[Tensor], Tensor], top: float) -> Tensor:
    """4-bit floats under an 8-bit power of two: 2 ** round_exponent(log2(max |x| / top))."""
    exponent = round_exponent((x.abs().amax(-1, keepdim=True) / top).clamp_min(2.0**-127).log2())
    return e2m1(x, exponent.clamp(-127, 127).exp2())


def nvfp4(x: Tensor) -> Tensor:
    """Blocks [..., 16] of 4-bit floats under an e4m3 scale each and one float32 scale for all of x."""
    tensor_scale = (x.abs().amax() / (6 * 448)).clamp_min(_SMALLEST)
    return e2m1(x, e4m3(x.abs().amax(-1, keepdim=True) / 6, tensor_scale))


def q4_0(x: Tensor) -> Tensor:
    """ggml's block of 32: scale = (value of the largest magnitude) / -8, a float16; codes 0..15 stand for -8..7."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = torch.where(scale == 0, 8, (x / torch.where(scale == 0, 1, scale) + 8.5).floor().clamp(0, 15))
    return (codes - 8) * fp16(scale)


def half_quadratic(x: Tensor, bits: int, steps: int = 20) -> Tensor:
    """Asymmetric; the zero point minimizes an l_0.7 error by half-quadratic splitting (HQQ, Badri and Shaji 2023)."""
    top = 2**bits - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    per_unit = torch.where(high - low <= 1e-4, 1.0, top / (high - low).clamp_min(1e-4)).clamp_max(2e4)
    zero, beta, least = -low * per_unit, 10.0, math.inf
    for _ in range(steps):
        codes = (x * per_unit + zero).round().clamp(0, top)
        error = x - (codes - zero) / per_unit
        if (mean_error := float(error.abs().mean())) >= least:
            break
        least = mean_error
        # soft threshold of the l_p norm, p = 0.7: equation 7
        outliers = error.sign() * (error.abs() - error.abs().clamp_min(1e-12).pow(0.7 - 1) / beta).clamp_min(0)
        zero = (codes - (x - outliers) * per_unit).mean(-1, keepdim=True)
        beta *= 1.01
    codes = (x * per_unit + zero).round().clamp(0, top)
    return (codes - fp16(zero)) * fp16(1 / per_unit)


# --- codebooks ---


@lru_cache
@torch.inference_mode(False)
def lloyd_max(bits: int, sphere_dim: int | None = None) -> Tensor:
    """Levels [2^bits] of least squared error for a unit Gaussian, or a coordinate of a unit vector in `sphere_dim`.

    Lloyd's two conditions in turn on a fine grid. The coordinate's density is (1 - x^2)^((d - 3) / 2)
    (TurboQuant, arXiv:2504.19874, lemma 1).
    """
    edge = 1.0 if sphere_dim else 8.0
    grid = torch.linspace(-edge, edge, 400_001, dtype=torch.float64)
    density = (1 - grid**2).clamp_min(0) ** ((sphere_dim - 3) / 2) if sphere_dim else torch.exp(-(grid**2) / 2)
    mass, moment = density.cumsum(0), (density * grid).cumsum(0)
    spread = ((density * grid**2).sum() / density.sum()).sqrt()
    levels = spread * torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    for _ in range(2_000):
        cuts = torch.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat((cuts - 1, torch.tensor([len(grid) - 1])))
        first = torch.zeros(1, dtype=torch.float64)
        moved = torch.diff(moment[ends], prepend=first) / torch.diff(mass[ends], prepend=first)
        if torch.equal(moved, levels):
            break
        levels = moved
    return ((levels - levels.flip(0)) / 2).float()


# --- rotations ---


@lru_cache
@torch.inference_mode(False)
def hadamard(head_dim: int) -> Tensor:
    """Sylvester's matrix [D, D] in blocks of the largest power of two that divides D; symmetric and orthonormal."""
    return hadamard_blocks(head_dim, head_dim & -head_dim)


@lru_cache
@torch.inference_mode(False)
def hadamard_blocks(head_dim: int, block: int) -> Tensor:
    """The Hadamard matrix of `block` channels, repeated along the diagonal [D, D]."""
    if head_dim % block:
        raise ValueError(f"head_dim={head_dim}: no multiple of the rotation's {block} channels")
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix * block**-0.5] * (head_dim // block))


@lru_cache
@torch.inference_mode(False)
def random_rotation(head_dim: int) -> Tensor:
    """A random orthonormal matrix [D, D]: QR of Gaussians, seed 0 (TurboQuant, section 3.1)."""
    gaussians = torch.randn(head_dim, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, upper = torch.linalg.qr(gaussians)
    return (basis * upper.diagonal().sign()).float()


# --- a format ---


def by_group(x: Tensor, group: int, quantize: Quantizer) -> Tensor:
    """`quantize` on the last axis in groups of `group`; the last group is shorter where that does not divide."""
    whole = x.shape[-1] // group * group
    parts = []
    if whole:
        parts.append(quantize(x[..., :whole].unflatten(-1, (-1, group))).flatten(-2))
    if whole < x.shape[-1]:
        parts.append(quantize(x[..., whole:]))
    return torch.cat(parts, -1) if parts else x


@dataclass(frozen=True)
class Part:
    """How keys, or values, are stored."""

    quantize: Quantizer
    code_bits: float
    group_bits: float = 0
    """Metadata of one group."""
    group: int | None = None
    """Values in a group; None: one head vector. Never more channels than a head has."""
    axis: str = "channels"
    """A group runs along "channels" of one token, or "tokens" of one channel."""
    rotation: Callable[[int], Tensor] | None = None
    """head_dim -> orthonormal [D, D]."""

    def bits_per_value(self, head_dim: int) -> float:
        return self.code_bits + self.group_bits / self._group(head_dim)

    def apply(self, x: Tensor) -> Tensor:
        """x [B, H, T, D] float32 -> its decoded twin."""
        rotation = self.rotation(x.shape[-1]).to(x) if self.rotation else None
        rotated = x if rotation is None else x @ rotation
        if self.axis == "tokens":
            decoded = by_group(rotated.transpose(-1, -2), self._group(x.shape[-1]), self.quantize).transpose(-1, -2)
        else:
            decoded = by_group(rotated, self._group(x.shape[-1]), self.quantize)
        return decoded if rotation is None else decoded @ rotation.T

    def _group(self, head_dim: int) -> int:
        if self.axis == "tokens":
            return self.group
        return min(self.group or head_dim, head_dim)


RAW = Part(lambda x: x, code_bits=16)


@dataclass(frozen=True)
class Codec:
    """A `Method` of two parts. Its bits leave out the residual's raw tokens, whose share falls with the length."""

    name: str
    source: str
    key: Part
    value: Part
    residual_tokens: int = 0
    """R: the newest T mod R tokens' keys and the newest R tokens' values stay raw (KIVI, algorithm 1)."""
    raw_layers: frozenset[int] = frozenset()
    """Layers kept at 16 bits."""
    layers: int = 0
    """Layers of the model; needed with `raw_layers`."""

    def bits_per_value(self, head_dim: int) -> float:
        packed = (self.key.bits_per_value(head_dim) + self.value.bits_per_value(head_dim)) / 2
        raw_share = len(self.raw_layers) / self.layers if self.raw_layers else 0
        return raw_share * 16 + (1 - raw_share) * packed

    def apply(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [B, H, T, D] float32 -> what attention reads instead."""
        if layer in self.raw_layers:
            return key, value
        tokens, residual = key.shape[-2], self.residual_tokens
        packed_keys = tokens - tokens % residual if residual else tokens
        packed_values = max(tokens - residual, 0)
        return _packed(self.key, key, packed_keys), _packed(self.value, value, packed_values)


def _packed(part: Part, x: Tensor, tokens: int) -> Tensor:
    """x with its first `tokens` tokens packed."""
    return torch.cat((part.apply(x[..., :tokens, :]), x[..., tokens:, :]), -2) if tokens else x


# --- the peers ---


def kivi(bits: int, residual_tokens: int = 0, group: int = 32) -> Codec:
    """KIVI (arXiv:2402.02750, section 3.3): keys per channel over `group` tokens, values per token over `group`
    channels, asymmetric; the paper's residual is 128 tokens."""
    part = partial(Part, partial(minmax, bits=bits), bits, 2 * FP16_BITS, group)
    return Codec(
        f"KIVI-{bits} g{group} r{residual_tokens}", "peer", part(axis="tokens"), part(), residual_tokens=residual_tokens
    )


def turboquant_paper(bits: int) -> Codec:
    """TurboQuant's MSE quantizer (arXiv:2504.19874, algorithm 1) for keys and values: random rotation, Lloyd-Max
    levels of a coordinate on the unit sphere, the norm in float16."""

    def quantize(x: Tensor) -> Tensor:
        return unit_codebook(x, lloyd_max(bits, sphere_dim=x.shape[-1]))

    part = Part(quantize, bits, FP16_BITS, rotation=random_rotation)
    return Codec(f"TurboQuant paper, mse {bits}", "peer", part, part)


def _turboquant_key(x: Tensor, bits: int) -> Tensor:
    return unit_codebook(x, lloyd_max(bits) * x.shape[-1] ** -0.5, renormalize=True)


def turboquant_vllm(preset: str, layers: int | None = None) -> Codec:
    """vLLM's presets (quantization/turboquant/config.py, ops/triton_turboquant_store.py).

    Keys: plain e4m3 (k8v4), or Hadamard, Lloyd-Max levels of N(0, 1/D), a float16 norm, levels made a unit
    vector again. Values: not rotated, asymmetric over the head vector, float16 scale and least value.
    vLLM keeps the first and last two layers at 16 bits; given the model's number of `layers`, so does this.
    """
    key_bits, value_bits = {"k8v4": (8, 4), "4bit": (4, 4), "k3v4": (3, 4), "3bit": (3, 3)}[preset]
    if key_bits == 8:
        key = Part(e4m3, 8)
    else:
        key = Part(partial(_turboquant_key, bits=key_bits), key_bits, FP16_BITS, rotation=hadamard)
    value = Part(partial(minmax, bits=value_bits), value_bits, 2 * FP16_BITS)
    name = f"TurboQuant vLLM {preset}"
    if layers is None:
        return Codec(name, "peer", key, value)
    edge = min(2, layers // 2)
    raw_layers = frozenset((*range(edge), *range(layers - edge, layers)))
    return Codec(f"{name}, {len(raw_layers)} layers raw", "peer", key, value, raw_layers=raw_layers, layers=layers)


def quarot_int4(group: int = 128) -> Codec:
    """QuaRot (arXiv:2404.00456, sections 4.2 and 5): Hadamard per head, asymmetric INT4 per token over groups of
    128 channels (a smaller head is one group), range clipped to 0.95; scale and zero point in float16."""
    quantize = partial(minmax_zero_point, bits=4, clip=0.95)
    part = Part(quantize, 4, 2 * FP16_BITS, group, rotation=hadamard)
    return Codec("QuaRot INT4", "peer", part, part)


def fp8() -> Codec:
    """SGLang's --kv-cache-dtype fp8_e4m3: one scale for a layer's keys and one for its values, which is 1 for a
    checkpoint without KV scales (layers/quantization/kv_cache.py)."""
    return Codec("fp8 e4m3, scale 1", "peer", Part(e4m3, 8), Part(e4m3, 8))


def float4(kind: str) -> Codec:
    """4-bit float blocks along the head: NVFP4 (blocks of 16, e4m3 scales under one float32 scale, here of each
    layer's tensor), MXFP4 (blocks of 32, power-of-two scales, OCP Microscaling Formats 1.0, section 6.3), and
    SGLang's fp4_mx_block16 (blocks of 16, power-of-two scales rounded up, kvfp4_tensor.py)."""
    group, quantize = {
        "NVFP4": (16, nvfp4),
        "MXFP4": (32, partial(e2m1_power_of_two, round_exponent=torch.floor, top=4.0)),
        "SGLang fp4 mx16": (16, partial(e2m1_power_of_two, round_exponent=torch.ceil, top=6.0)),
    }[kind]
    part = Part(quantize, 4, 8, group)
    return Codec(f"{kind} g{group}", "peer", part, part)


def llama_cpp(kind: str) -> Codec:
    """llama.cpp's q4_0 or q8_0 cache: blocks of 32 under a float16 scale (ggml-quants.c), after a Hadamard
    rotation: keys in the largest block that divides the head, values in blocks of 64 (PR 21038)."""
    bits, quantize = {"q4_0": (4, q4_0), "q8_0": (8, partial(absmax, bits=8))}[kind]
    part = partial(Part, quantize, bits, FP16_BITS, 32)

    def values_rotation(head_dim: int) -> Tensor:
        return hadamard_blocks(head_dim, min(64, head_dim & -head_dim))

    return Codec(f"llama.cpp {kind} rotated", "peer", part(rotation=hadamard), part(rotation=values_rotation))


def quantized_cache(backend: str, bits: int) -> Codec:
    """transformers' QuantizedCache with its defaults: keys and values per token in groups of 64 channels (a smaller
    head is one group), asymmetric, scale and shift in float16 as for a float16 model; no residual.

    The backends' arithmetic, not the backends: quanto compiles C++ into its own folder when it first decodes
    and waits forever for a compilation that was cut short, and transformers imports an installed hqq
    everywhere. Tests compare with both where they are installed (optimum-quanto 0.2.7, hqq 0.2.8).
    """
    quantize = {"quanto": minmax, "hqq": half_quadratic}[backend]
    part = Part(partial(quantize, bits=bits), bits, 2 * FP16_BITS, 64)
    return Codec(f"QuantizedCache {backend}-{bits} g64, own arithmetic", "peer", part, part)


def methods(layers: int | None = None, residual: bool = False) -> list[Method]:
    """All peers. `layers`: the model's, which adds TurboQuant's rows as vLLM serves them, with 4 raw layers.
    `residual`: KIVI keeps its 128 raw tokens (the protocol where a prefix is compressed and read on from)."""
    peers: list[Method] = [kivi(bits, residual_tokens=128 if residual else 0) for bits in (4, 2)]
    peers += [quantized_cache(backend, bits) for backend, bits in product(("quanto", "hqq"), (4, 2))]
    presets = ("k8v4", "4bit", "k3v4", "3bit")
    peers += [turboquant_vllm(preset) for preset in presets]
    peers += [turboquant_vllm(preset, layers) for preset in presets if layers]
    peers += [turboquant_paper(bits) for bits in (4, 3, 2)]
    peers += [quarot_int4(), fp8(), *map(float4, ("NVFP4", "MXFP4", "SGLang fp4 mx16"))]
    return [*peers, llama_cpp("q8_0"), llama_cpp("q4_0")]
