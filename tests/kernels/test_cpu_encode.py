"""The compiled encode against its twin: bytes, ties, and what it leaves alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deltastore_kernels import native, packing
from deltastore_kernels.layout import PACKED_BITS, RAW, Format, PageLayout
from tests import budgets
from tests.kernels.attention_case import OPS, gaussian, key_basis
from tests.kernels.cpu_case import CPU, ISAS, isa
from tests.kernels.head_dims import HEAD_DIMS

assert isa  # fixture

FORMATS = [*(Format(*bits) for bits in product(PACKED_BITS, repeat=2)), RAW]


def tiles(count: int, heads: int, head_dim: int, seed: int) -> torch.Tensor:
    """[N, H, 16, D] of sizes that differ from token to token."""
    sizes = torch.exp2(gaussian(count, heads, 16, 1, seed=seed + 1000))
    return gaussian(count, heads, 16, head_dim, seed=seed) * sizes


def encoded(
    ops, key: torch.Tensor, value: torch.Tensor, layout: PageLayout, poison: int = 0, key_shaping=None
) -> torch.Tensor:
    """Tiles in scattered places of scattered pages."""
    count = -(-len(key) // layout.tiles) + 3
    places = torch.randperm(count * layout.tiles, generator=torch.Generator().manual_seed(3))[: len(key)]
    pages = torch.full((count, layout.page_bytes), poison, dtype=torch.uint8)
    ops.encode(key, value, places // layout.tiles, places % layout.tiles, pages, layout, key_shaping)
    return pages


@pytest.mark.parametrize(("fmt", "head_dim"), list(product(FORMATS, HEAD_DIMS)), ids=str)
def test_bytes_equal_the_twins(fmt: Format, head_dim: int, isa: str) -> None:
    layout = PageLayout(fmt, 3, head_dim, 48)
    key, value = tiles(17, 3, head_dim, seed=1).half(), tiles(17, 3, head_dim, seed=2).half()
    for poison in (0x00, 0xFF):
        got, want = encoded(CPU, key, value, layout, poison), encoded(OPS, key, value, layout, poison)
        # In so small a sample a near tie is one byte, if any.
        assert int((got != want).sum()) <= 1 + budgets.BACKEND_CODES_DIFFER * got.numel()


@pytest.mark.parametrize(("bits", "head_dim"), list(product(PACKED_BITS, HEAD_DIMS)))
def test_shaped_bytes_equal_the_twins(bits: int, head_dim: int, isa: str) -> None:
    layout = PageLayout(Format(bits, 2), 3, head_dim, 48)
    key, value = tiles(17, 3, head_dim, seed=1).half(), tiles(17, 3, head_dim, seed=2).half()
    shaping = key_basis(3, head_dim, seed=3).shaping
    got, want = (encoded(ops, key, value, layout, key_shaping=shaping) for ops in (CPU, OPS))
    # A near tie changes what the vector's later dims are rounded to, so vectors are counted, not bytes.
    keys = [OPS.decode(pages, torch.arange(len(pages)), layout)[0] for pages in (got, want)]
    assert (
        int((keys[0] != keys[1]).any(-1).sum()) <= 1 + budgets.BACKEND_SHAPED_VECTORS_DIFFER * keys[0][..., 0].numel()
    )
    for field in ("value_codes", "scales", "anchors"):
        differ = packing.field(got, layout, field) != packing.field(want, layout, field)
        assert int(differ.sum()) <= 1
    assert not torch.equal(got, encoded(CPU, key, value, layout))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_near_ties_are_rare(bits: int) -> None:
    layout = PageLayout(Format(bits, bits), 2, 128, 16)
    key, value = tiles(1000, 2, 128, seed=5), tiles(1000, 2, 128, seed=6)
    got, want = encoded(CPU, key, value, layout), encoded(OPS, key, value, layout)
    nibbles = [packing.field(pages, layout, "scales") for pages in (got, want)]
    assert float((nibbles[0] != nibbles[1]).float().mean()) <= budgets.BACKEND_SCALES_DIFFER
    same_scales = (nibbles[0] == nibbles[1]).all(-1)
    for side in ("key_codes", "value_codes"):
        codes = [packing.field(pages, layout, side)[same_scales] for pages in (got, want)]
        assert float((codes[0] != codes[1]).float().mean()) <= budgets.BACKEND_CODES_DIFFER


@pytest.mark.parametrize(("bits", "head_dim"), list(product(PACKED_BITS, HEAD_DIMS)))
def test_every_instruction_set_gives_the_same_bytes(bits: int, head_dim: int) -> None:
    layout = PageLayout(Format(bits, bits), 2, head_dim, 16)
    key, value = tiles(100, 2, head_dim, seed=7), tiles(100, 2, head_dim, seed=8)
    shaping = key_basis(2, head_dim, seed=9).shaping
    before, images = native.isa(), []
    for name in ISAS:
        native.use_isa(name)
        images.append(torch.cat([encoded(CPU, key, value, layout, key_shaping=how) for how in (None, shaping)]))
    native.use_isa(before)
    assert all(torch.equal(image, images[0]) for image in images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_strides_and_dtypes(dtype: torch.dtype, isa: str) -> None:
    layout = PageLayout(Format(4, 3), 3, 64, 16)
    token_major = tiles(5, 3, 64, seed=9).transpose(1, 2).contiguous().to(dtype)  # [N, 16, H, D], as tokens come
    head_major = token_major.transpose(1, 2)
    want = encoded(OPS, head_major.float(), head_major.float(), layout)
    assert torch.equal(encoded(CPU, head_major, head_major, layout), want)
    assert torch.equal(encoded(CPU, head_major, head_major.float().contiguous(), layout), want)
    spread = head_major.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(encoded(CPU, spread, spread, layout), want)


def test_threads_change_nothing(isa: str) -> None:
    layout = PageLayout(Format(4, 3), 3, 64, 64)
    key, value = tiles(40, 3, 64, seed=10), tiles(40, 3, 64, seed=11)
    want = encoded(CPU, key, value, layout)
    torch.set_num_threads(2)
    try:
        assert torch.equal(encoded(CPU, key, value, layout), want)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-12, 65504.0, 1e30, float("inf"), float("nan")])
def test_any_input_decodes_to_finite_values(bits: int, size: float, isa: str) -> None:
    layout = PageLayout(Format(bits, bits), 2, 32, 16)
    x = gaussian(2, 2, 16, 32, seed=1).sign() * size
    for decoded in OPS.decode(encoded(CPU, x, x, layout), torch.arange(5), layout):
        assert decoded.isfinite().all()
    if size < 1e30:
        assert torch.equal(encoded(CPU, x, x, layout), encoded(OPS, x, x, layout))


def test_a_poisoned_tile_harms_no_other_tile(isa: str) -> None:
    layout = PageLayout(Format(4, 3), 2, 64, 16)
    x = tiles(3, 2, 64, seed=12)
    want = encoded(CPU, x, x, layout)
    x[1] = float("nan")
    differ = (encoded(CPU, x, x, layout) != want).any(1)
    assert int(differ.sum()) == 1


def test_no_tiles(isa: str) -> None:
    layout = PageLayout(Format(4, 3), 2, 64, 48)
    none = torch.zeros(0, dtype=torch.int64)
    pages = torch.full((2, layout.page_bytes), 255, dtype=torch.uint8)
    CPU.encode(tiles(0, 2, 64, seed=1), tiles(0, 2, 64, seed=1), none, none, pages, layout)
    assert torch.all(pages == 255)


@pytest.mark.parametrize(("page", "tile"), [(-2, 0), (2, 0), (0, -1), (0, 3)])
def test_refuses_a_place_that_is_not_there(page: int, tile: int) -> None:
    layout = PageLayout(Format(4, 3), 2, 64, 48)
    pages = torch.full((2, layout.page_bytes), 255, dtype=torch.uint8)
    x = tiles(1, 2, 64, seed=1)
    with pytest.raises(ValueError, match=f"tile {tile} of page {page}"):
        CPU.encode(x, x, torch.tensor([page]), torch.tensor([tile]), pages, layout)
    assert torch.all(pages == 255)
