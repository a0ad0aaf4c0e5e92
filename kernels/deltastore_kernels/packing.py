"""Codes to bytes and back, and a page's fields, as layout.py defines them. Plain torch; exact inverses.

Shapes: codes [..., T=16, D] uint8 (below 2**bits), packed [..., 16 * D * bits / 8] uint8.
"""

from __future__ import annotations

import torch

from .layout import LINE_BYTES, PLANES, TILE_TOKENS, PageLayout

RAW_DTYPE = torch.float16
"""Frames and raw pages: finer than bfloat16, and rotated keys and values stay far below its maximum."""


def to_raw(x: torch.Tensor) -> torch.Tensor:
    """Any float -> RAW_DTYPE, finite: what would overflow becomes the largest finite value, and NaN becomes 0.

    Rounded first and mended after: in bfloat16 the largest float16 is 65536, so a clamp before would miss it.
    """
    return x.to(RAW_DTYPE).nan_to_num()


def finite(x: torch.Tensor) -> torch.Tensor:
    """Any float -> float32 in RAW_DTYPE's range, by the same rule and without its rounding: what encode sees."""
    largest = torch.finfo(RAW_DTYPE).max
    return x.float().nan_to_num(0.0, largest, -largest).clamp_(-largest, largest)


def field(pages: torch.Tensor, layout: PageLayout, name: str) -> torch.Tensor:
    """A view of one field: pages [N, page_bytes] uint8 -> [N, H, tiles, bytes per tile]."""
    offset, tile_bytes = layout.field_offsets_bytes[name]
    end = offset + layout.num_kv_heads * layout.tiles * tile_bytes
    return pages[:, offset:end].view(pages.shape[0], layout.num_kv_heads, layout.tiles, tile_bytes)


def key_lines(codes: torch.Tensor) -> torch.Tensor:
    """[..., 16, D] -> [..., D / 4 lines, 64]: each line has 4 dims of all tokens."""
    quads = codes.contiguous().view(torch.int32)  # [..., token, D / 4]: four dims move as one word
    return quads.transpose(-2, -1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def key_from_lines(lines: torch.Tensor) -> torch.Tensor:
    """Inverse of `key_lines`."""
    quads = lines.contiguous().view(torch.int32)  # [..., D / 4, token]
    return quads.transpose(-2, -1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def value_lines(codes: torch.Tensor) -> torch.Tensor:
    """[..., 16, D] -> [..., D / 4 lines, 64]: each line has 16 dims of 4 tokens."""
    *lead, tokens, head_dim = codes.shape
    grid = codes.reshape(*lead, tokens // 4, 4, head_dim // 16, 16)  # token/4, token%4, dim/16, dim%16
    order = [*range(len(lead)), *(len(lead) + axis for axis in (2, 0, 3, 1))]
    return grid.permute(order).reshape(*lead, head_dim // 4, LINE_BYTES)


def value_from_lines(lines: torch.Tensor) -> torch.Tensor:
    """Inverse of `value_lines`."""
    *lead, count, _ = lines.shape
    grid = lines.reshape(*lead, count // 4, TILE_TOKENS // 4, 16, 4)  # dim/16, token/4, dim%16, token%4
    order = [*range(len(lead)), *(len(lead) + axis for axis in (1, 3, 0, 2))]
    return grid.permute(order).reshape(*lead, TILE_TOKENS, count * 4)


def pack_lines(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """lines [..., L, 64] uint8 codes -> packed [..., L * 64 * bits / 8] uint8."""
    *lead, count, _ = lines.shape
    planes, below = [], bits
    for width in PLANES[bits]:
        below -= width
        per_register = 8 // width
        digits = ((lines >> below) & ((1 << width) - 1)).reshape(*lead, count // per_register, per_register, LINE_BYTES)
        register = torch.zeros_like(digits[..., 0, :])
        for k in range(per_register):
            register |= digits[..., k, :] << (k * width)
        planes.append(register.flatten(-2))
    return torch.cat(planes, dim=-1)


def unpack_lines(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_lines`: uint8 codes [..., L, 64]."""
    *lead, total_bytes = packed.shape
    count = total_bytes * 8 // bits // LINE_BYTES
    lines = torch.zeros(*lead, count, LINE_BYTES, dtype=torch.uint8, device=packed.device)
    begin, below = 0, bits
    for width in PLANES[bits]:
        below -= width
        per_register = 8 // width
        end = begin + count * LINE_BYTES * width // 8
        register = packed[..., begin:end].reshape(*lead, count // per_register, 1, LINE_BYTES)
        digits = torch.cat([(register >> (k * width)) & ((1 << width) - 1) for k in range(per_register)], dim=-2)
        lines |= digits.view(*lead, count, LINE_BYTES) << below
        begin = end
    return lines
