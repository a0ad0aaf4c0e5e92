"""decode: packed pages -> rotated floats."""

from __future__ import annotations

import torch

from ... import codec, packing
from ...context import LayerStore
from ...layout import ANCHOR_BIAS, ANCHORS_PER_OCTAVE, NO_PAGE, PageLayout


def decode(pages: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """pages [pages, page_bytes] uint8, page_ids [N] int -> key_rot, value_rot [N, H, P, D] float32."""
    chosen = pages[page_ids]
    # Heads first while the tiles are still small: attention then has a head's tokens in one piece.
    key_bytes, value_bytes, scales, anchors = (
        packing.field(chosen, layout, name).transpose(0, 1) for name in layout.field_offsets_bytes
    )
    if layout.format.is_raw:
        tiles = [part.contiguous().view(packing.RAW_DTYPE).float() for part in (key_bytes, value_bytes)]
    else:
        key_bits, value_bits = layout.format.key_bits, layout.format.value_bits
        key_codes = packing.key_from_lines(packing.unpack_lines(key_bytes, key_bits))
        value_codes = packing.value_from_lines(packing.unpack_lines(value_bytes, value_bits))
        key_scale, value_scale = _scales(scales, anchors)
        tiles = [levels_of(key_codes, key_bits).mul_(key_scale), levels_of(value_codes, value_bits).mul_(value_scale)]
    shape = (layout.num_kv_heads, len(chosen), layout.page_tokens, layout.head_dim)
    return tiles[0].reshape(shape).transpose(0, 1), tiles[1].reshape(shape).transpose(0, 1)


def decode_stored(layer: LayerStore, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode`, of pages as a step names them: coarse ones too."""
    if layer.coarse is None:
        return decode(layer.pages, page_ids, layer.layout)
    finer = decode(layer.pages, page_ids.clamp_min(0), layer.layout)
    coarse = decode(layer.coarse.pages, page_ids.clamp_max(NO_PAGE), layer.coarse.layout)
    is_coarse = (page_ids < 0)[:, None, None, None]
    return torch.where(is_coarse, coarse[0], finer[0]), torch.where(is_coarse, coarse[1], finer[1])


def levels_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes, any shape, uint8 -> their levels, float32."""
    grid = torch.tensor(codec.levels(bits), device=codes.device)
    return grid.index_select(0, codes.int().flatten()).view(codes.shape)


def _scales(scales: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [..., 16] and [..., 2] of tiles -> key and value scales, each [..., 16, 1] float32."""
    nibbles = scales.int()
    largest = torch.exp2((anchors.float() - ANCHOR_BIAS) / ANCHORS_PER_OCTAVE)
    factors = torch.tensor(codec.nibble_factors(), device=scales.device)
    return (
        (factors[nibbles & 15] * largest[..., :1]).unsqueeze(-1),
        (factors[nibbles >> 4] * largest[..., 1:]).unsqueeze(-1),
    )
