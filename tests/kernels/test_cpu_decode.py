"""The compiled decode against its twin."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deltastore_kernels import native
from deltastore_kernels.layout import PACKED_BITS, RAW, Format, PageLayout
from tests import budgets
from tests.kernels.attention_case import OPS
from tests.kernels.cpu_case import CPU, fresh_memory_is_nan, isa
from tests.kernels.head_dims import HEAD_DIMS

assert fresh_memory_is_nan, isa  # fixtures

FORMATS = [*(Format(*bits) for bits in product(PACKED_BITS, repeat=2)), RAW]


def random_pages(layout: PageLayout, count: int) -> torch.Tensor:
    """Pages of any bytes whatsoever, as finite floats where the format is raw."""
    generator = torch.Generator().manual_seed(7)
    if layout.format.is_raw:
        return torch.randn(count, layout.page_bytes // 2, generator=generator).half().view(torch.uint8)
    return torch.randint(0, 256, (count, layout.page_bytes), generator=generator, dtype=torch.int32).to(torch.uint8)


@pytest.mark.parametrize(("fmt", "head_dim"), list(product(FORMATS, HEAD_DIMS)), ids=str)
@pytest.mark.parametrize(("heads", "page_tokens"), [(1, 16), (3, 48)])
def test_decode_equals_its_twin(fmt: Format, head_dim: int, heads: int, page_tokens: int, isa: str) -> None:
    layout = PageLayout(fmt, heads, head_dim, page_tokens)
    pages, page_ids = random_pages(layout, 5), torch.tensor([3, 0, 4], dtype=torch.int32)
    for got, want in zip(CPU.decode(pages, page_ids, layout), OPS.decode(pages, page_ids, layout), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=budgets.BACKEND_DECODE, atol=0)


def test_every_scale_and_level(isa: str) -> None:
    """All 256 anchors with all 16 nibbles: each product is the twin's, to the rounding of 2**x."""
    layout = PageLayout(Format(4, 4), 1, 32, 16)
    pages = random_pages(layout, 256)
    offset, _ = layout.field_offsets_bytes["scales"]
    pages[:, offset : offset + 16] = torch.arange(16) * 17
    offset, _ = layout.field_offsets_bytes["anchors"]
    pages[:, offset : offset + 2] = torch.arange(256)[:, None]
    page_ids = torch.arange(256)
    for got, want in zip(CPU.decode(pages, page_ids, layout), OPS.decode(pages, page_ids, layout), strict=True):
        torch.testing.assert_close(got, want, rtol=budgets.BACKEND_DECODE, atol=0)


def test_threads_change_nothing(isa: str) -> None:
    layout = PageLayout(Format(4, 3), 3, 64, 64)
    pages, page_ids = random_pages(layout, 40), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    want = CPU.decode(pages, page_ids, layout)
    torch.set_num_threads(2)
    try:
        got = CPU.decode(pages, page_ids, layout)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_no_pages(isa: str) -> None:
    layout = PageLayout(Format(4, 3), 2, 64, 48)
    key_rot, _ = CPU.decode(random_pages(layout, 2), torch.zeros(0, dtype=torch.int64), layout)
    assert key_rot.shape == (0, 2, 48, 64)


def test_a_slice_of_a_longer_buffer_leaves_the_rest_alone(isa: str) -> None:
    layout = PageLayout(Format(3, 2), 2, 64, 48)
    pages, page_ids = random_pages(layout, 5), torch.tensor([1, 4])
    buffer = torch.full((2, 2, 100, 64), 7.0)
    native.decode(pages, page_ids, layout, buffer[0, :, 4:84], buffer[1, :, 4:84])
    for got, want in zip(buffer, OPS.decode(pages, page_ids, layout), strict=True):
        torch.testing.assert_close(
            got[:, 4:84], want.transpose(0, 1).flatten(1, 2)[:, :80], rtol=budgets.BACKEND_DECODE, atol=0
        )
        assert torch.all(got[:, :4] == 7)
        assert torch.all(got[:, 84:] == 7)


@pytest.mark.parametrize("page", [-1, 5])
def test_refuses_a_page_that_is_not_there(page: int) -> None:
    layout = PageLayout(Format(4, 3), 2, 64, 48)
    with pytest.raises(ValueError, match=f"page {page} of 5"):
        CPU.decode(random_pages(layout, 5), torch.tensor([0, page]), layout)
