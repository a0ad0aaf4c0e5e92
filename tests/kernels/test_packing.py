"""packing.py: exact inverses, and every code at the address that layout.py's docstring names."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltastore_kernels import packing
from deltastore_kernels.layout import PACKED_BITS, PLANES, RAW, Format, PageLayout
from tests.kernels.head_dims import HEAD_DIMS
from tests.kernels.layout_oracle import read_codes

SIDES = {
    "key": (packing.key_lines, packing.key_from_lines),
    "value": (packing.value_lines, packing.value_from_lines),
}
CASES = list(product(SIDES, PACKED_BITS, HEAD_DIMS))


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    lead=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(case: tuple[str, int, int], lead: list[int], seed: int) -> None:
    side, bits, head_dim = case
    to_lines, from_lines = SIDES[side]
    codes = random_codes(bits, *lead, 16, head_dim, seed=seed)
    packed = packing.pack_lines(to_lines(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, 16 * head_dim * bits // 8)
    assert torch.equal(from_lines(packing.unpack_lines(packed, bits)), codes)


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from(PACKED_BITS), head_dim=st.sampled_from(HEAD_DIMS), seed=st.integers(0, 2**32 - 1))
def test_every_byte_string_is_a_valid_packed_tile(bits: int, head_dim: int, seed: int) -> None:
    packed = random_codes(8, 2, 16 * head_dim * bits // 8, seed=seed)
    lines = packing.unpack_lines(packed, bits)
    assert int(lines.max()) < 2**bits
    assert torch.equal(packing.pack_lines(lines, bits), packed)


@pytest.mark.parametrize(("side", "bits", "head_dim"), CASES)
def test_codes_lie_where_the_layout_says(side: str, bits: int, head_dim: int) -> None:
    codes = random_codes(bits, 16, head_dim, seed=head_dim + bits)
    packed = packing.pack_lines(SIDES[side][0](codes), bits)
    assert read_codes(bytes(packed.tolist()), side, bits, head_dim) == codes.tolist()


@pytest.mark.parametrize("side", SIDES)
def test_lines_of_a_view_equal_lines_of_a_copy(side: str) -> None:
    to_lines, from_lines = SIDES[side]
    codes = random_codes(4, 3, 2, 64, 16).transpose(-2, -1)
    assert not codes.is_contiguous()
    lines = to_lines(codes)
    assert torch.equal(lines, to_lines(codes.clone(memory_format=torch.contiguous_format)))
    wide = lines.repeat_interleave(2, dim=0)[::2]
    assert torch.equal(from_lines(wide), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dropping_the_last_plane_leaves_the_coarser_code(head_dim: int) -> None:
    codes = random_codes(3, 5, 16, head_dim)
    packed = packing.pack_lines(packing.key_lines(codes), 3)
    kept_bytes = 16 * head_dim * PLANES[3][0] // 8
    assert torch.equal(packing.key_from_lines(packing.unpack_lines(packed[:, :kept_bytes], 2)), codes >> 1)


@pytest.mark.parametrize("fmt", [Format(4, 3), Format(3, 2), RAW], ids=str)
def test_fields_are_views_of_disjoint_bytes(fmt: Format) -> None:
    layout = PageLayout(fmt, 3, 64, 48)
    pages = torch.zeros(4, layout.page_bytes, dtype=torch.uint8)
    for name, (_, tile_bytes) in layout.field_offsets_bytes.items():
        field = packing.field(pages, layout, name)
        assert field.shape == (4, 3, 3, tile_bytes)
        field += 1
    offset, tile_bytes = layout.field_offsets_bytes["anchors"]
    used_bytes = offset + 9 * tile_bytes
    assert torch.all(pages[:, :used_bytes] == 1)
    assert torch.all(pages[:, used_bytes:] == 0)


def test_a_field_counts_tiles_inside_heads() -> None:
    layout = PageLayout(Format(4, 3), 3, 64, 48)
    pages = torch.arange(layout.page_bytes).to(torch.int32)[None]
    field = packing.field(pages, layout, "value_codes")
    offset, tile_bytes = layout.field_offsets_bytes["value_codes"]
    assert int(field[0, 2, 1, 5]) == offset + (2 * 3 + 1) * tile_bytes + 5


def test_to_raw_saturates_instead_of_overflowing() -> None:
    raw = packing.to_raw(torch.tensor([1e9, -1e9, 65504.0, 0.1]))
    assert raw.dtype == packing.RAW_DTYPE == torch.float16
    assert raw[:3].tolist() == [65504.0, -65504.0, 65504.0]
    assert float(raw[3]) == pytest.approx(0.1, abs=1e-4)
