"""NaN, infinite and huge numbers cost their own token: in the definition, and in the compiled kernels with every
instruction set. triton_codec.py has the same for Triton."""

from __future__ import annotations

import hashlib
from itertools import product

import pytest
import torch
from hypothesis import given, settings

from deltastore_kernels import native, ops, packing
from deltastore_kernels.layout import PACKED_BITS, RAW, Format, PageLayout
from tests import budgets
from tests.kernels.bad_numbers import HUGE, BadTile, bad_tiles, differing_tokens, encoded, largest_of
from tests.kernels.cpu_case import CPU, ISAS

OPS = ops.load("reference")


def every_backend(tile: BadTile, sides: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The definition's bytes, once every instruction set has written the same ones."""
    want = encoded(OPS, tile, sides)
    before = native.isa()
    for name in ISAS:
        native.use_isa(name)
        assert torch.equal(encoded(CPU, tile, sides), want), name
    native.use_isa(before)
    return want


@settings(max_examples=40, deadline=None)
@given(tile=bad_tiles((32, 64), HUGE, most_tokens=8))
def test_a_huge_token_costs_itself(tile: BadTile) -> None:
    page = every_backend(tile, tile.sides())
    zeroed = encoded(OPS, tile, tile.sides(instead=0.0))
    assert differing_tokens(tile, page, zeroed) <= {(0, token) for token in tile.tokens}
    decoded = OPS.decode(page, torch.tensor([0]), tile.layout)
    largest = largest_of(page, tile)
    for side, (got, given_side) in enumerate(zip(decoded, tile.sides(), strict=True)):
        for token in tile.tokens:
            got_row = got[0, 0, token, : tile.dims]
            # As large as the tile can say, with its sign.
            want = largest[0, side] * given_side[0, 0, token, : tile.dims].float().sign()
            if side or not tile.shaped:  # a shaped key's later dims make up for the errors of the earlier ones
                torch.testing.assert_close(got_row, want, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(tile=bad_tiles((32, 64), (float("nan"),), most_tokens=16))
def test_what_is_no_number_is_stored_as_zero(tile: BadTile) -> None:
    page = every_backend(tile, tile.sides())
    cleaned = [side.nan_to_num(0.0) for side in tile.sides()]
    assert torch.equal(page, encoded(OPS, tile, cleaned))


@pytest.mark.parametrize("bad", [1e5, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_neighbours_keep_their_precision_on_the_way_through_a_store(bad: float, dtype: torch.dtype) -> None:
    """A store rounds to float16 before it encodes."""
    tile = BadTile(Format(4, 4), 64, dtype, bad, (5,), 1, shaped=False)
    page = every_backend(tile, tuple(packing.to_raw(side) for side in tile.sides()))
    others = [token for token in range(16) if token != 5]
    decoded = OPS.decode(page, torch.tensor([0]), tile.layout)
    for got, given_side in zip(decoded, tile.sides(), strict=True):
        want = given_side[:, :, others].float()
        error = float(((got[:, :, others] - want).square().sum() / want.square().sum()).sqrt())
        assert error <= 1.05 * budgets.FORMAT_VALUE_RMS[4]  # fifteen tokens are a small sample


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_raw_pages_frames_and_sinks_hold_the_same(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e5, -65504.0, 1.0]).to(dtype)
    want = torch.tensor([0.0, 65504.0, -65504.0, 65504.0, -65504.0, 1.0]).half()
    assert torch.equal(packing.to_raw(x), want)
    layout = PageLayout(RAW, 1, 32, 16)
    tiles = x.repeat(86)[:512].view(1, 1, 16, 32)
    for backend in (OPS, CPU):
        page = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
        backend.encode(tiles, tiles, torch.tensor([0]), torch.tensor([0]), page, layout)
        assert torch.equal(page.view(torch.float16), want.repeat(86)[:512].repeat(2)[None])


def test_a_tile_that_is_large_as_a_whole_keeps_its_size() -> None:
    """More than half of such a size: then it is the tile's."""
    tile = BadTile(Format(4, 4), 64, torch.float32, 6e4, tuple(range(9)), 64, shaped=False)
    page = every_backend(tile, tile.sides())
    assert packing.field(page, tile.layout, "anchors")[0, 0, 0].tolist() == [255, 255]


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Sums of twelve uniform 8-bit numbers: bell-shaped, and the same on every machine, unlike torch.randn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (12, *shape), generator=generator).sum(0).float() / 256


DIGEST_OF_CLEAN_TILES = "0366753f7204fedbc39eedabd75386262d323745bb6451598be0f5e32e400e42"


def test_clean_tiles_keep_their_bytes() -> None:
    """Bytes of the encoder before it knew of bad numbers: sizes up to 90 times apart, zeros, all formats."""
    digest = hashlib.sha256()
    for bits, head_dim in product(PACKED_BITS, (32, 64, 128, 256)):
        layout = PageLayout(Format(bits, 6 - bits), 2, head_dim, 16)
        sizes = torch.tensor([1.5**i for i in range(12)] + [0.0, 0.5, 1.0, 1.0])[:, None]
        key, value = (whole_numbers(6, 2, 16, head_dim, seed=seed) * sizes for seed in (1, 2))
        shaping = (whole_numbers(2, head_dim, head_dim, seed=3) / 16).tril(-1) + torch.eye(head_dim)
        for dtype, shaped in product((torch.float16, torch.float32), (None, shaping)):
            pages = torch.zeros(6, layout.page_bytes, dtype=torch.uint8)
            CPU.encode(key.to(dtype), value.to(dtype), torch.arange(6), torch.zeros(6).long(), pages, layout, shaped)
            digest.update(pages.numpy().tobytes())
    assert digest.hexdigest() == DIGEST_OF_CLEAN_TILES
