"""encode: raw tiles -> packed bytes in their pages. Happens once for each token; loses precision.

What is no number, or far too large, costs its own token and nothing else, in keys and in values alike:

    NaN          is stored as 0 (`packing.to_raw`, which raw frames, sinks and pages go through as well). A key that
                 is all NaN, as one NaN makes it in the rotation, is a zero vector then: it scores about 0 with every
                 query. Such a value adds nothing.
    infinite,    becomes float16's largest finite number, and its token is huge:
    overflowing
    huge token   one whose scale is at least codec.HUGE_SCALE, and over codec.HUGE_RATIO times that of half of the
                 tile's tokens. The tile's anchor disregards it: the others' bytes are what they are beside a zero
                 token. It gets the largest scale of the tile and the nearest codes to be had there, so its signs
                 stay and its size is lost.

Where more than half of a tile is of such a size, that is the tile's size.
"""

from __future__ import annotations

import torch

from ... import codec, packing
from ...layout import ANCHOR_BIAS, ANCHORS_PER_OCTAVE, NO_PAGE, SCALE_NIBBLES, SCALE_STEP_LOG2, TILE_TOKENS, PageLayout
from ..decode.reference import levels_of

_SMALLEST = 2.0**-40  # keeps log2 finite for all-zero vectors


def encode(
    key_rot: torch.Tensor,
    value_rot: torch.Tensor,
    page_ids: torch.Tensor,
    tile_ids: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    key_shaping: torch.Tensor | None = None,
) -> None:
    """Encode N whole tiles into `pages`.

    key_rot, value_rot [N, H, 16, D] float; page_ids, tile_ids [N] int64 (tile within the page; page NO_PAGE: the
    tile goes nowhere); pages [pages, page_bytes] uint8 (written). Each (page, tile) at most once in a call.
    key_shaping [H, D, D] float32: see `_shaped`; None rounds each dim by itself.
    """
    kept = page_ids != NO_PAGE
    key_rot, value_rot, page_ids, tile_ids = (x[kept] for x in (key_rot, value_rot, page_ids, tile_ids))
    if layout.format.is_raw:
        fields = {
            "key_codes": packing.to_raw(key_rot).flatten(-2).view(torch.uint8),
            "value_codes": packing.to_raw(value_rot).flatten(-2).view(torch.uint8),
        }
    else:
        key_rot, value_rot = packing.finite(key_rot), packing.finite(value_rot)
        key_codes, key_nibbles, key_anchors = encode_keys(key_rot, layout.format.key_bits, key_shaping)
        value_codes, value_nibbles, value_anchors = encode_values(value_rot, layout.format.value_bits)
        fields = {
            "key_codes": packing.pack_lines(packing.key_lines(key_codes), layout.format.key_bits),
            "value_codes": packing.pack_lines(packing.value_lines(value_codes), layout.format.value_bits),
            "scales": key_nibbles | (value_nibbles << 4),
            "anchors": torch.stack((key_anchors, value_anchors), dim=-1),
        }
    for name, field_bytes in fields.items():
        packing.field(pages, layout, name)[page_ids, :, tile_ids] = field_bytes


def encode_keys(
    key_rot: torch.Tensor, bits: int, key_shaping: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., 16, D], finite -> codes [..., 16, D], nibbles [..., 16], anchors [...], all uint8.

    The scale is, of the grid's nearest to the vector's RMS and its two neighbours, the one with the
    least cost; the first in that order where costs are equal. Without `key_shaping` each dim takes
    its nearest level, and the cost is the squared error; with it see `_shaped`.
    """
    nearest, anchors = _round_scales(_rms(key_rot))
    codes, nibbles, least = key_rot, nearest, None
    for step in (0, -1, 1):
        tried = (nearest + step).clamp(0, SCALE_NIBBLES - 1)
        scale = _scale(tried, anchors)
        tried_codes, cost = (
            _nearest(key_rot, scale, bits) if key_shaping is None else _shaped(key_rot, scale, bits, key_shaping)
        )
        if least is None:
            codes, nibbles, least = tried_codes, tried, cost
            continue
        better = cost < least
        codes = torch.where(better[..., None], tried_codes, codes)
        nibbles, least = torch.where(better, tried, nibbles), torch.where(better, cost, least)
    return codes, nibbles.to(torch.uint8), anchors.to(torch.uint8)


def _nearest(key_rot: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] at scale [...] -> the codes of the nearest levels, and their squared error [...]."""
    codes = _codes(key_rot / scale[..., None], bits)
    return codes, levels_of(codes, bits).mul_(scale[..., None]).sub_(key_rot).square_().sum(-1)


def _shaped(
    key_rot: torch.Tensor, scale: torch.Tensor, bits: int, key_shaping: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, H, 16, D] at scale [N, H, 16], key_shaping [H, D, D] float32 -> codes, and what queries see of their error.

    A key's error e costs e^T W e, where W is the second moment of the head's queries, and queries are far
    from isotropic. With W = M^T M, M lower triangular, the cost is the sum over dims i of
    (M_ii (e_i + sum_{j < i} M_ij / M_ii e_j))^2: whatever the dims before i got wrong moves what dim i
    should be rounded to, so errors go where no query looks. This is noise shaping; with codes chosen
    greedily it is the rounding of LDLQ (Chee et al., arXiv:2307.13304, section 3) and GPTQ, here for a
    cache instead of weights. Decoding knows nothing of it.

    key_shaping holds M_ij / M_ii below the diagonal, M_ii on it, zeros above. Sums are taken dim by dim
    with separately rounded products, so that every backend rounds alike.
    """
    strength = torch.diagonal(key_shaping, dim1=-2, dim2=-1)[:, None]  # [H, 1, D]
    wanted, cost = key_rot.clone(), torch.zeros_like(scale)
    codes = torch.empty(key_rot.shape, dtype=torch.uint8, device=key_rot.device)
    for dim in range(key_rot.shape[-1]):
        codes[..., dim] = _codes(wanted[..., dim] / scale, bits)
        level = levels_of(codes[..., dim], bits) * scale
        cost += ((level - wanted[..., dim]) * strength[..., dim]).square_()
        error = level - key_rot[..., dim]
        wanted[..., dim + 1 :] -= key_shaping[:, None, dim + 1 :, dim] * error[..., None]
    return codes, cost


def encode_values(value_rot: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `encode_keys`, with unbiased scales: <v, v_hat> = <v, v>.

    Attention sums values over tokens. With the least-squares scale each v_hat is short by the
    quantizer's distortion, and the sum with it; with this scale the errors average out instead.
    The codes' own divisor follows the scale's rounding, which keeps the product unbiased.
    """
    rms = _rms(value_rot)
    unbiased = _unbiased_scale(value_rot, rms, bits)
    nibbles, anchors = _round_scales(unbiased)
    divisor = rms * _scale(nibbles, anchors) / unbiased
    return _codes(value_rot / divisor[..., None], bits), nibbles.to(torch.uint8), anchors.to(torch.uint8)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(dim=-1).sqrt().clamp_min(_SMALLEST)


def _codes(normalized: torch.Tensor, bits: int) -> torch.Tensor:
    halves = (normalized * (2 / codec.LEVEL_UNIT[bits])).ceil_().clamp_(-codec.HALVES_MAX, codec.HALVES_MAX)
    row = halves.nan_to_num_(0).int().flatten() + codec.HALVES_MAX
    table = torch.tensor(codec.codes_of_halves(bits), dtype=torch.uint8, device=normalized.device)
    return table.index_select(0, row).view(normalized.shape)


def _unbiased_scale(x: torch.Tensor, divisor: torch.Tensor, bits: int) -> torch.Tensor:
    levels = levels_of(_codes(x / divisor[..., None], bits), bits)
    return (x.square().sum(-1) / (x * levels).sum(-1).clamp_min(_SMALLEST)).clamp_min(_SMALLEST)


def _round_scales(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale [..., 16] -> its nibbles [..., 16] and the tile's anchors [...], whole float numbers."""
    log2_scale = scale.log2()
    largest_log2 = log2_scale.masked_fill(_is_huge(scale), -torch.inf).amax(-1)
    anchors = (largest_log2 * ANCHORS_PER_OCTAVE + ANCHOR_BIAS).round().clamp(0, 255)
    steps_down = (_largest_log2(anchors)[..., None] - log2_scale) / SCALE_STEP_LOG2
    return steps_down.round().clamp(0, SCALE_NIBBLES - 1), anchors


def _is_huge(scale: torch.Tensor) -> torch.Tensor:
    """scale [..., 16] -> bool; never all of a tile's tokens."""
    larger_half = scale.kthvalue(TILE_TOKENS // 2, dim=-1, keepdim=True).values  # the least that half do not exceed
    return (scale >= codec.HUGE_SCALE) & (scale > codec.HUGE_RATIO * larger_half)


def _scale(nibbles: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """What decode makes of nibbles [..., 16] and anchors [...]."""
    return torch.exp2(_largest_log2(anchors)[..., None] - nibbles * SCALE_STEP_LOG2)


def _largest_log2(anchors: torch.Tensor) -> torch.Tensor:
    return (anchors - ANCHOR_BIAS) / ANCHORS_PER_OCTAVE
