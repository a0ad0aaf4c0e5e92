"""rotate, encode and decode in Triton against their twins. Started by test_triton.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings

from deltastore_kernels import ops
from deltastore_kernels.layout import GPU_HEAD_DIMS, NO_PAGE, PACKED_BITS, RAW, Format, PageLayout
from tests import budgets
from tests.kernels.attention_case import gaussian, key_basis
from tests.kernels.bad_numbers import HUGE, BadTile, bad_tiles, encoded
from tests.kernels.triton_case import DEVICE, ON_GPU, TRITON, asm, on_device  # noqa: F401  asm is a fixture

TWIN = ops.load("reference")
FORMATS = [Format(*bits) for bits in product(PACKED_BITS, repeat=2)] + [RAW]
HEADS = 2
PAGE_IDS, TILE_IDS = torch.tensor([3, NO_PAGE, 0, 3, 1]), torch.tensor([0, 0, 1, 2, 2])


def tiles(head_dim: int, count: int = 5, heads: int = HEADS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [count, heads, 16, D] of sizes that differ from token to token, one vector of each zero."""
    sides = tuple(
        gaussian(count, heads, 16, head_dim, seed=seed + i) * gaussian(count, heads, 16, 1, seed=seed + 8 + i).exp()
        for i in range(2)
    )
    for side in sides:
        side[:1, 0, 3] = 0
    return sides


def encoded_alike(layout: PageLayout, sides, shaping: torch.Tensor | None = None) -> int:
    """Bytes that encode writes otherwise than its twin, of pages full of 0xFF."""
    want = torch.full((4, layout.page_bytes), 255, dtype=torch.uint8)
    got = on_device(want.clone())
    count = len(sides[0])
    ids = PAGE_IDS[:count], TILE_IDS[:count]
    TWIN.encode(*sides, *ids, want, layout, shaping)
    TRITON.encode(
        *map(on_device, sides), *map(on_device, ids), got, layout, None if shaping is None else on_device(shaping)
    )
    return int((got.cpu() != want).sum())


# On a GPU exp2 and log2 are approximations of their own: a near tie may then fall the other way.
BYTES_DIFFER = 16 if ON_GPU else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", GPU_HEAD_DIMS)
def test_rotate(dtype: torch.dtype, head_dim: int) -> None:
    x = gaussian(37, 3, head_dim, seed=1).to(dtype)
    got, want = TRITON.rotate(on_device(x)).cpu(), TWIN.rotate(x)
    assert got.dtype == dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # one unit in the last place
    torch.testing.assert_close(got.float(), want.float(), rtol=rounding, atol=budgets.BACKEND_ROTATE)


def test_rotate_takes_views_and_nothing() -> None:
    x = gaussian(5, 6, 64, seed=1)
    view = on_device(x)[:, ::2]
    torch.testing.assert_close(TRITON.rotate(view).cpu(), TWIN.rotate(x[:, ::2]), rtol=0, atol=budgets.BACKEND_ROTATE)
    assert TRITON.rotate(view[:0]).shape == (0, 3, 64)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_encode_writes_the_twins_bytes(fmt: Format) -> None:
    assert encoded_alike(PageLayout(fmt, HEADS, 64, 48), tiles(64)) <= BYTES_DIFFER


@pytest.mark.parametrize("head_dim", [32, 128, 256, 512])
@pytest.mark.parametrize("fmt", [Format(4, 3), Format(3, 2), Format(2, 4), RAW], ids=str)
def test_encode_of_every_head_dim(fmt: Format, head_dim: int) -> None:
    assert encoded_alike(PageLayout(fmt, 1, head_dim, 48), tiles(head_dim, count=3, heads=1)) <= BYTES_DIFFER


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_encode_of_shaped_keys(bits: int) -> None:
    shaping = key_basis(HEADS, 32, seed=5).shaping
    for laid_out in (shaping, shaping.mT.contiguous().mT):
        layout = PageLayout(Format(bits, 2), HEADS, 32, 48)
        assert encoded_alike(layout, tiles(32, count=3), laid_out) <= BYTES_DIFFER


def test_encode_takes_views_of_any_float_dtype() -> None:
    layout = PageLayout(Format(4, 2), HEADS, 64, 48)
    key, value = (side.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for side in tiles(64))
    assert encoded_alike(layout, (key, value)) <= BYTES_DIFFER


# derandomize: examples take seconds in the interpreter
@settings(max_examples=12, deadline=None, derandomize=True)
@given(tile=bad_tiles((32,), (*HUGE, float("nan")), most_tokens=8))
def test_encode_of_bad_numbers_writes_the_twins_bytes(tile: BadTile) -> None:
    got, want = encoded(TRITON, tile, tile.sides(), DEVICE), encoded(TWIN, tile, tile.sides())
    assert int((got != want).sum()) <= BYTES_DIFFER


def test_raw_pages_hold_finite_numbers() -> None:
    sides = tiles(32, count=2, heads=1)
    sides[0][0, 0, 0, 5], sides[1][1, 0, 2, 7], sides[1][1, 0, 2, 8] = torch.nan, torch.inf, -1e9
    assert encoded_alike(PageLayout(RAW, 1, 32, 48), sides) == 0


def test_encode_of_nothing() -> None:
    layout = PageLayout(Format(4, 2), 1, 32, 48)
    pages = on_device(torch.full((4, layout.page_bytes), 255, dtype=torch.uint8))
    key, value = tiles(32, count=0, heads=1)
    none = torch.zeros(0, dtype=torch.int64)
    TRITON.encode(*map(on_device, (key, value, none, none)), pages, layout)
    assert (pages == 255).all()


@pytest.mark.parametrize("head_dim", [32, 64, 256, 512])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_decode(fmt: Format, head_dim: int, asm: bool) -> None:  # noqa: F811
    layout = PageLayout(fmt, HEADS if head_dim == 64 else 1, head_dim, 48)
    pages = torch.randint(0, 256, (3, layout.page_bytes), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    if fmt.is_raw:
        pages = gaussian(3, layout.page_bytes // 2, seed=7).half().view(torch.uint8)
    ids = torch.tensor([2, 0])
    got, want = TRITON.decode(on_device(pages), on_device(ids), layout), TWIN.decode(pages, ids, layout)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=budgets.BACKEND_DECODE_EXP2, atol=0)


def test_pages_beyond_two_gigabytes() -> None:
    """A page's first byte does not fit 32 bits. Only the touched pages are ever backed by memory."""
    layout = PageLayout(Format(4, 2), 1, 64, 16)
    page = 2**32 // layout.page_bytes + 3
    pages = torch.empty(page + 1, layout.page_bytes, dtype=torch.uint8, device=DEVICE)
    key, value = tiles(64, count=1, heads=1)
    for index in (torch.int32, torch.int64):
        pages[[3, page]] = 255
        ids, tile_ids = on_device(torch.tensor([page], dtype=index)), on_device(torch.tensor([0], dtype=index))
        TRITON.encode(on_device(key), on_device(value), ids, tile_ids, pages, layout)
        assert (pages[3] == 255).all()
        got = TRITON.decode(pages, ids, layout)
        small = pages[page:].cpu().clone()
        for ours, theirs in zip(got, TWIN.decode(small, torch.tensor([0]), layout), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=budgets.BACKEND_DECODE_EXP2, atol=0)
