"""The byte layout of a KV page. Every byte size in the project is derived here, once.

A page holds P consecutive tokens of one sequence for one layer: all KV heads, keys and values.
Inside a page, each KV head owns P / 16 tiles; a tile is 16 consecutive tokens of one head. A page
is four fields one after the other, each of shape [heads, tiles, bytes of the field per tile]:

    key_codes | value_codes | scales | anchors | zero padding up to a multiple of 16 bytes

    key ~= KEY_LEVELS[key_code] * key_scale        value ~= VALUE_LEVELS[value_code] * value_scale
    scale = 2 ** (anchor_log2 - nibble * SCALE_STEP_LOG2)

    scales   one byte for each token: low nibble for the key, high nibble for the value
    anchors  two bytes for each tile: the key's and the value's largest scale, see `anchor_log2`

Two 8-bit scales for each token would cost 0.25 bits per value pair at head_dim 64; nibbles under a
tile-wide anchor cost half, because codes are chosen after the scale and make up for its rounding.

Codes are stored in *lines*: a line is one 64-byte SIMD register or four 16-byte GPU loads once
each code is widened to a byte. What a line gathers is what a dot product consumes at once:

    key line   i holds dims 4i .. 4i+3 of all 16 tokens:       byte = 4 * token + dim % 4
    value line i holds dims 16(i/4) .. +15 of tokens 4(i%4) .. +3:  byte = 4 * (dim % 16) + token % 4

Codes of b bits are split into *planes* (3 = 2 + 1, most significant first); in a plane of w bits,
8 / w lines share one 64-byte register: line r * 8/w + k lies at bit k * w of register r. Dropping
the last plane of a 3-bit code leaves a 2-bit code of the same value range (embedded codes).

The raw format keeps rotated 16-bit floats in the same page shape: keys [16, D] row-major in
key_codes, values in value_codes, no scales, no anchors.

A model's head may have fewer dims than are stored (`stored_head_dim`): 80 in 96, say. Zeros lie between them then
(basis.py: `spread`), and cost as much as dims do.

Legend: T tokens, H KV heads, D head_dim, P tokens per page, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

TILE_TOKENS = 16
LINE_BYTES = 64
PAGE_ALIGN_BYTES = 16
RAW_BITS = 16
PACKED_BITS = (2, 3, 4)
HEAD_DIMS = tuple(range(32, 513, 32))
"""Stored dims of a head. A 1-bit plane's register holds 32 dims."""
GPU_HEAD_DIMS = (32, 64, 128, 256, 512)
"""Those that the kernels for GPUs know: Triton's blocks are powers of two."""
NO_PAGE = -1
"""In place of a page id: encoding skips the tile. A step whose shapes must not depend on values has such tiles."""

#: bits of a code -> widths of its planes, most significant first
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,)}

#: log2 distance of two neighbouring scale nibbles; 15 steps reach 1/49 of the anchor
SCALE_STEP_LOG2 = 0.375
SCALE_NIBBLES = 16
#: an anchor byte a stands for log2(scale) = (a - ANCHOR_BIAS) / ANCHORS_PER_OCTAVE
ANCHORS_PER_OCTAVE = 8
ANCHOR_BIAS = 160


@dataclass(frozen=True)
class Format:
    """Bits of one layer's key and value codes; 16 for both means raw 16-bit floats."""

    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        packed = self.key_bits in PACKED_BITS and self.value_bits in PACKED_BITS
        if not packed and not self.is_raw:
            raise ValueError(
                f"Format(key_bits={self.key_bits}, value_bits={self.value_bits}): allowed are "
                f"{PACKED_BITS} bits for each of key and value, or {RAW_BITS} for both (raw)"
            )

    @property
    def is_raw(self) -> bool:
        return self.key_bits == RAW_BITS == self.value_bits

    def __str__(self) -> str:
        return "raw" if self.is_raw else f"K{self.key_bits}V{self.value_bits}"


RAW = Format(RAW_BITS, RAW_BITS)

_ALLOWED_HEAD_DIMS = f"allowed are multiples of {HEAD_DIMS[0]} up to {HEAD_DIMS[-1]}, as the code lines need them"


@dataclass(frozen=True)
class PageLayout:
    """Byte sizes and offsets of one layer's page.

    head_dim            as stored, one of HEAD_DIMS
    key_dim, value_dim  of the model's keys and values, at most head_dim; 0: head_dim

    Raises ValueError for a head_dim or page size that has no layout.
    """

    format: Format
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    key_dim: int = 0
    value_dim: int = 0

    @classmethod
    def holding(
        cls,
        format: Format,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        page_tokens: int,
        head_dims: Sequence[int] = HEAD_DIMS,
    ) -> PageLayout:
        """The narrowest layout for a model's heads, of those that are stored as one of `head_dims`."""
        head_dim = stored_head_dim(key_dim, value_dim, head_dims)
        return cls(format, num_kv_heads, head_dim, page_tokens, key_dim, value_dim)

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim={self.head_dim}: {_ALLOWED_HEAD_DIMS}")
        for name in ("key_dim", "value_dim"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, self.head_dim)
            if not 0 < getattr(self, name) <= self.head_dim:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 to head_dim, {self.head_dim}")
        if self.page_tokens <= 0 or self.page_tokens % TILE_TOKENS:
            raise ValueError(
                f"page_size={self.page_tokens}: a page holds whole tiles, so it must be a multiple "
                f"of {TILE_TOKENS}; use --page-size {TILE_TOKENS} or 64"
            )
        if self.num_kv_heads <= 0:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: must be at least 1")

    @property
    def tiles(self) -> int:
        """Tiles per KV head in a page."""
        return self.page_tokens // TILE_TOKENS

    # Bytes of each field for one tile of one head.
    @property
    def key_codes_bytes(self) -> int:
        return TILE_TOKENS * self.head_dim * self.format.key_bits // 8

    @property
    def value_codes_bytes(self) -> int:
        return TILE_TOKENS * self.head_dim * self.format.value_bits // 8

    @property
    def scales_bytes(self) -> int:
        return 0 if self.format.is_raw else TILE_TOKENS

    @property
    def anchors_bytes(self) -> int:
        return 0 if self.format.is_raw else 2

    @cached_property
    def field_offsets_bytes(self) -> dict[str, tuple[int, int]]:
        """Field name -> (offset in the page, bytes per tile)."""
        offsets, offset = {}, 0
        for name in ("key_codes", "value_codes", "scales", "anchors"):
            tile_bytes = getattr(self, f"{name}_bytes")
            offsets[name] = (offset, tile_bytes)
            offset += self.num_kv_heads * self.tiles * tile_bytes
        return offsets

    @cached_property
    def page_bytes(self) -> int:
        """All bytes of a page, padding included."""
        offset, tile_bytes = self.field_offsets_bytes["anchors"]
        used = offset + self.num_kv_heads * self.tiles * tile_bytes
        return -(-used // PAGE_ALIGN_BYTES) * PAGE_ALIGN_BYTES

    @property
    def raw_page_bytes(self) -> int:
        """Bytes of the model's own keys and values as 16-bit floats: what a ratio is measured against."""
        return self.page_tokens * self.num_kv_heads * (self.key_dim + self.value_dim) * RAW_BITS // 8

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame: a request's unfinished tile as 16-bit floats, keys and values."""
        return TILE_TOKENS * self.num_kv_heads * self.head_dim * 2 * RAW_BITS // 8


def stored_head_dim(key_dim: int, value_dim: int, head_dims: Sequence[int] = HEAD_DIMS) -> int:
    """The least of `head_dims` that holds a model's keys and values. Raises ValueError where none does."""
    wanted = max(key_dim, value_dim)
    if wanted <= 0 or not (wide_enough := [head_dim for head_dim in head_dims if head_dim >= wanted]):
        raise ValueError(f"keys of {key_dim} dims and values of {value_dim}: allowed are 1 to {max(head_dims)}")
    return min(wide_enough)


def code_lines(head_dim: int) -> int:
    """Lines of one tile's keys (or values)."""
    return TILE_TOKENS * head_dim // LINE_BYTES
