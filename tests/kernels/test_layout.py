"""layout.py: byte counts against a table written by hand, invariants of all formats, refusals."""

from __future__ import annotations

from itertools import product

import pytest

from deltastore_kernels.layout import GPU_HEAD_DIMS, PACKED_BITS, PLANES, RAW, Format, PageLayout, code_lines
from tests.kernels.head_dims import HEAD_DIMS

# format, heads, head_dim, page tokens | key codes, value codes, scales, anchors of a tile | page
EXPECTED_BYTES = [
    (Format(4, 3), 3, 64, 64, (512, 384, 16, 2), 10_976),  # 12 tiles of 914, and 8 of padding
    (Format(3, 2), 3, 64, 64, (384, 256, 16, 2), 7_904),  # 12 of 658, and 8
    (Format(4, 2), 8, 128, 16, (1024, 512, 16, 2), 12_432),  # 8 of 1,554, no padding
    (Format(2, 2), 1, 32, 16, (128, 128, 16, 2), 288),  # 274, and 14
    (Format(4, 4), 4, 256, 48, (2048, 2048, 16, 2), 49_376),  # 12 of 4,114, and 8
    (Format(2, 4), 2, 128, 64, (512, 1024, 16, 2), 12_432),  # 8 of 1,554
    (Format(3, 3), 1, 128, 16, (768, 768, 16, 2), 1_568),  # 1,554, and 14
    (Format(4, 3), 4, 96, 64, (768, 576, 16, 2), 21_792),  # 16 tiles of 1,362, no padding
    (Format(3, 2), 1, 160, 16, (960, 640, 16, 2), 1_632),  # 1,618, and 14
    (Format(4, 2), 2, 512, 16, (4096, 2048, 16, 2), 12_336),  # 2 of 6,162, and 12
    (RAW, 4, 96, 16, (3072, 3072, 0, 0), 24_576),  # 4 of 6,144
    (RAW, 3, 64, 64, (2048, 2048, 0, 0), 49_152),  # 12 of 4,096
    (RAW, 8, 128, 16, (4096, 4096, 0, 0), 65_536),  # 8 of 8,192
]
FIELDS = ("key_codes", "value_codes", "scales", "anchors")
FORMATS = [Format(*bits) for bits in product(PACKED_BITS, repeat=2)] + [RAW]
LAYOUTS = [
    PageLayout(fmt, heads, head_dim, page_tokens)
    for fmt, heads, head_dim, page_tokens in product(FORMATS, (1, 3, 8), HEAD_DIMS, (16, 48, 64))
]


@pytest.mark.parametrize(("fmt", "heads", "head_dim", "page_tokens", "tile_bytes", "page_bytes"), EXPECTED_BYTES)
def test_byte_counts(
    fmt: Format, heads: int, head_dim: int, page_tokens: int, tile_bytes: tuple[int, ...], page_bytes: int
) -> None:
    layout = PageLayout(fmt, heads, head_dim, page_tokens)
    assert tuple(layout.field_offsets_bytes[name][1] for name in FIELDS) == tile_bytes
    assert layout.page_bytes == page_bytes


def test_fields_follow_one_another_without_gap_or_overlap() -> None:
    for layout in LAYOUTS:
        assert tuple(layout.field_offsets_bytes) == FIELDS
        end = 0
        for offset, tile_bytes in layout.field_offsets_bytes.values():
            assert offset == end, f"{layout}: a field begins at {offset}, the one before ends at {end}"
            assert offset % 16 == 0, f"{layout}: unaligned field at {offset}"
            end += layout.num_kv_heads * layout.tiles * tile_bytes
        assert end <= layout.page_bytes < end + 16
        assert layout.page_bytes % 16 == 0


def test_ratio_counts_every_byte_of_the_page() -> None:
    for layout in LAYOUTS:
        assert layout.raw_page_bytes == layout.page_tokens * layout.num_kv_heads * layout.head_dim * 4
        fmt = layout.format
        metadata_bits = 0 if fmt.is_raw else 8 + 1  # for each token and head: two nibbles, 1/16 of two anchors
        ideal = 32 * layout.head_dim / ((fmt.key_bits + fmt.value_bits) * layout.head_dim + metadata_bits)
        padding = 1 - 16 / layout.page_bytes
        assert ideal * padding < layout.raw_page_bytes / layout.page_bytes <= ideal
    assert PageLayout(RAW, 3, 64, 64).raw_page_bytes == PageLayout(RAW, 3, 64, 64).page_bytes


def test_k3v2_reaches_its_published_ratio_at_head_dim_64() -> None:
    layout = PageLayout(Format(3, 2), 3, 64, 64)
    assert layout.raw_page_bytes / layout.page_bytes > 6.2


def test_a_frame_is_one_raw_tile_of_every_head() -> None:
    for layout in LAYOUTS:
        assert layout.frame_bytes * layout.tiles == layout.raw_page_bytes


def test_planes_add_up_and_fill_whole_registers() -> None:
    assert set(PLANES) == set(PACKED_BITS)
    for bits, widths in PLANES.items():
        assert sum(widths) == bits
        for width, head_dim in product(widths, HEAD_DIMS):
            assert code_lines(head_dim) == head_dim // 4
            assert code_lines(head_dim) % (8 // width) == 0, f"{bits} bits, head_dim {head_dim}: a register is torn"


def test_format_names() -> None:
    assert [str(fmt) for fmt in (Format(4, 3), Format(2, 4), RAW)] == ["K4V3", "K2V4", "raw"]
    assert [fmt.is_raw for fmt in (Format(4, 4), RAW)] == [False, True]


@pytest.mark.parametrize("bits", [(5, 4), (4, 5), (16, 4), (4, 16), (8, 8), (0, 0), (1, 2)])
def test_format_refuses_other_bits(bits: tuple[int, int]) -> None:
    with pytest.raises(ValueError) as refusal:
        Format(*bits)
    message = str(refusal.value)
    assert f"key_bits={bits[0]}" in message
    assert f"value_bits={bits[1]}" in message
    assert "(2, 3, 4)" in message
    assert "16 for both" in message


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_tokens", "got", "allowed"),
    [
        (3, 80, 64, "head_dim=80", "multiples of 32 up to 512"),
        (3, 544, 64, "head_dim=544", "multiples of 32 up to 512"),
        (3, 0, 64, "head_dim=0", "multiples of 32 up to 512"),
        (3, 64, 24, "page_size=24", "multiple of 16"),
        (3, 64, 1, "page_size=1", "--page-size 16 or 64"),
        (3, 64, 0, "page_size=0", "multiple of 16"),
        (3, 64, -16, "page_size=-16", "multiple of 16"),
        (0, 64, 16, "num_kv_heads=0", "at least 1"),
    ],
)
def test_layout_refuses(heads: int, head_dim: int, page_tokens: int, got: str, allowed: str) -> None:
    with pytest.raises(ValueError) as refusal:
        PageLayout(Format(4, 3), heads, head_dim, page_tokens)
    assert got in str(refusal.value)
    assert allowed in str(refusal.value)


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "stored", "on_gpu"),
    [(64, 64, 64, 64), (80, 80, 96, 128), (96, 96, 96, 128), (112, 112, 128, 128), (160, 160, 160, 256),
     (192, 128, 192, 256), (1, 1, 32, 32)],
)  # fmt: skip
def test_a_head_is_stored_in_the_next_dims_that_there_are_kernels_for(
    key_dim: int, value_dim: int, stored: int, on_gpu: int
) -> None:
    for head_dims, expected in ((HEAD_DIMS, stored), (GPU_HEAD_DIMS, on_gpu)):
        layout = PageLayout.holding(Format(4, 3), 2, key_dim, value_dim, 16, head_dims)
        assert layout.head_dim == expected
        assert layout.page_bytes == PageLayout(Format(4, 3), 2, expected, 16).page_bytes
        # The ratio is to what the model's own dims take.
        assert layout.raw_page_bytes == 16 * 2 * (key_dim + value_dim) * 2


@pytest.mark.parametrize(("key_dim", "value_dim"), [(544, 64), (64, 544), (0, 0)])
def test_a_head_wider_than_any_kernel_is_refused(key_dim: int, value_dim: int) -> None:
    with pytest.raises(ValueError, match=f"keys of {key_dim} dims and values of {value_dim}: allowed are 1 to 512"):
        PageLayout.holding(Format(4, 3), 2, key_dim, value_dim, 16, GPU_HEAD_DIMS)
