"""decode in Triton: one program for some tiles of one KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...codec import LEVEL_UNIT
from ...layout import Format, PageLayout
from .._triton import (
    PageConstants,
    key_levels,
    load_codes,
    load_scales,
    storage_index,
    storage_order,
    use_asm,
    value_levels,
)

BLOCK_TILES = 2


def decode(pages: torch.Tensor, page_ids: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """See the twin."""
    shape = (len(page_ids), layout.num_kv_heads, layout.page_tokens, layout.head_dim)
    key_rot, value_rot = (torch.empty(shape, dtype=torch.float32, device=pages.device) for _ in range(2))
    asm = use_asm(pages)
    if len(page_ids):
        decode_tiles[(len(page_ids), layout.num_kv_heads, triton.cdiv(layout.tiles, BLOCK_TILES))](
            pages, page_ids, key_rot, value_rot, PAGE=PageConstants.of(layout),
            **units(layout.format), TILES=BLOCK_TILES, USE_ASM=asm,
        )  # fmt: skip
    return key_rot, value_rot


def units(fmt: Format) -> dict[str, float | None]:
    """Compile-time level units; raw pages have none."""
    return {"KEY_UNIT": LEVEL_UNIT.get(fmt.key_bits), "VALUE_UNIT": LEVEL_UNIT.get(fmt.value_bits)}


@triton.jit
def decode_tiles(
    pages,
    page_ids,
    key_rot,  # [N, H, P, D] float32
    value_rot,
    PAGE: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    TILES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """TILES tiles of one head of the page_ids' n-th page."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.multiple_of(pages + tl.load(page_ids + n).to(tl.int64) * PAGE.page_bytes, 16)
    tile = tl.program_id(2) * TILES + tl.arange(0, TILES)
    exists = tile < PAGE.tiles
    place = head * PAGE.tiles + tile
    natural, dim = tl.arange(0, TILES * 16), tl.arange(0, PAGE.head_dim)
    first_token = (n * PAGE.heads + head) * (PAGE.tiles * 16) + tl.program_id(2) * (TILES * 16)
    left = PAGE.tiles * 16 - tl.program_id(2) * (TILES * 16)  # tokens of the page from here on
    if PAGE.key_bits == 16:
        offset = natural[:, None] * PAGE.head_dim + dim[None, :]
        key_page = (page + (head * PAGE.tiles + tl.program_id(2) * TILES) * (32 * PAGE.head_dim)).to(
            tl.pointer_type(tl.float16)
        )
        kept = (natural < left)[:, None]
        key = tl.load(key_page + offset, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(key_page + PAGE.value_offset // 2 + offset, mask=kept, other=0.0).to(tl.float32)
        target = first_token * PAGE.head_dim + offset
        tl.store(key_rot + target, key, mask=kept)
        tl.store(value_rot + target, value, mask=kept)
    else:
        key_log2, value_log2 = load_scales(
            page + (PAGE.scales_offset + place * 16), page + (PAGE.anchors_offset + place * 2), exists, 0.0, 0.0
        )
        packed = load_codes(page + place * (2 * PAGE.head_dim * PAGE.key_bits), exists, PAGE.key_bits, PAGE.head_dim)
        key = key_levels(packed, PAGE.key_bits, USE_ASM).to(tl.float32) * KEY_UNIT * tl.exp2(key_log2)[None, :]
        key_dim = storage_index(PAGE.head_dim, PAGE.key_bits)
        target = (first_token + natural)[None, :] * PAGE.head_dim + key_dim[:, None]
        tl.store(key_rot + target, key, mask=(natural < left)[None, :])

        packed = load_codes(
            page + (PAGE.value_offset + place * (2 * PAGE.head_dim * PAGE.value_bits)),
            exists,
            PAGE.value_bits,
            PAGE.head_dim,
        )
        token = storage_index(TILES * 16, PAGE.value_bits)
        scale = _stored(tl.exp2(value_log2), PAGE.value_bits)
        value = value_levels(packed, PAGE.value_bits, USE_ASM).to(tl.float32) * VALUE_UNIT * scale[:, None]
        target = (first_token + token)[:, None] * PAGE.head_dim + dim[None, :]
        tl.store(value_rot + target, value, mask=(token < left)[:, None])


@triton.jit
def _stored(x, BITS: tl.constexpr):
    """x [N] in natural order of tokens -> in storage order."""
    return tl.reshape(storage_order(x[None, :], BITS), x.shape)
