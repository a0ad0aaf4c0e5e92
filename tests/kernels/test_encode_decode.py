"""encode and decode: the bytes they touch, what the codec loses, and inputs at the edges."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deltastore_kernels import codec, ops, packing
from deltastore_kernels.layout import PACKED_BITS, RAW, SCALE_STEP_LOG2, Format, PageLayout
from tests import budgets
from tests.kernels.head_dims import HEAD_DIMS
from tests.kernels.layout_oracle import read_codes

OPS = ops.load("reference")
FORMATS = [Format(*bits) for bits in product(PACKED_BITS, repeat=2)] + [RAW]
HEADS = 2


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(key: torch.Tensor, value: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, H, 16, D] through pages of one tile, one after the other."""
    layout = PageLayout(fmt, key.shape[1], key.shape[-1], 16)
    pages = torch.full((len(key), layout.page_bytes), 255, dtype=torch.uint8)
    page_ids = torch.arange(len(key))
    OPS.encode(key, value, page_ids, torch.zeros_like(page_ids), pages, layout)
    return OPS.decode(pages, page_ids, layout)


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).square().sum() / want.square().sum()).sqrt())


@pytest.mark.parametrize(("bits", "head_dim"), list(product(PACKED_BITS, HEAD_DIMS)))
def test_round_trip_error(bits: int, head_dim: int) -> None:
    # Vectors of different sizes, as in a model: 2^-2 .. 2^2 around 1.
    size = torch.exp2(gaussian(64, HEADS, 16, 1, seed=1).clamp(-2, 2))
    key, value = gaussian(64, HEADS, 16, head_dim, seed=2), gaussian(64, HEADS, 16, head_dim, seed=3)
    key_hat, value_hat = round_trip(key * size, value * size, Format(bits, bits))
    assert rms_error(key_hat / size, key) <= budgets.FORMAT_KEY_RMS[bits]
    assert rms_error(value_hat / size, value) <= budgets.FORMAT_VALUE_RMS[bits]


@pytest.mark.parametrize(("bits", "head_dim"), list(product(PACKED_BITS, HEAD_DIMS)))
def test_values_are_unbiased(bits: int, head_dim: int) -> None:
    value = gaussian(64, HEADS, 16, head_dim) * torch.exp2(gaussian(64, HEADS, 16, 1, seed=1).clamp(-2, 2))
    _, value_hat = round_trip(value, value, Format(4, bits))
    share = (value * value_hat).sum(-1) / value.square().sum(-1)
    assert abs(float(share.mean()) - 1) <= budgets.FORMAT_VALUE_BIAS[bits]


def test_raw_pages_hold_float16_exactly() -> None:
    key, value = gaussian(5, HEADS, 16, 64).half(), gaussian(5, HEADS, 16, 64, seed=1).half()
    layout = PageLayout(RAW, HEADS, 64, 16)
    pages = torch.zeros(5, layout.page_bytes, dtype=torch.uint8)
    page_ids = torch.arange(5)
    OPS.encode(key, value, page_ids, torch.zeros_like(page_ids), pages, layout)
    key_hat, value_hat = OPS.decode(pages, page_ids, layout)
    assert torch.equal(key_hat, key.float())
    assert torch.equal(value_hat, value.float())
    assert bytes(pages.flatten().tolist()) == b"".join(
        side[page].numpy().tobytes() for page in range(5) for side in (key, value)
    )
    assert rms_error(round_trip(gaussian(4, 1, 16, 64), gaussian(4, 1, 16, 64), RAW)[0], gaussian(4, 1, 16, 64)) <= (
        budgets.FORMAT_RAW_RMS
    )


@pytest.mark.parametrize(("fmt", "head_dim"), list(product(FORMATS[:-1], (32, 128))))
def test_decode_reads_the_bytes_that_the_layout_names(fmt: Format, head_dim: int) -> None:
    """Random pages against layout.py's formula, one element at a time."""
    layout = PageLayout(fmt, HEADS, head_dim, 48)
    pages = torch.randint(0, 256, (3, layout.page_bytes), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    decoded = OPS.decode(pages, torch.tensor([1]), layout)
    page, head, tile = pages[1].tolist(), 1, 2

    def field(name: str) -> list[int]:
        offset, tile_bytes = layout.field_offsets_bytes[name]
        begin = offset + (head * layout.tiles + tile) * tile_bytes
        return page[begin : begin + tile_bytes]

    for index, (side, bits) in enumerate((("key", fmt.key_bits), ("value", fmt.value_bits))):
        codes = read_codes(bytes(field(f"{side}_codes")), side, bits, head_dim)
        anchor_log2 = codec.anchor_log2(field("anchors")[index])
        nibbles = [byte >> 4 * index & 15 for byte in field("scales")]
        scales = [2 ** (anchor_log2 - nibble * SCALE_STEP_LOG2) for nibble in nibbles]
        want = [[codec.levels(bits)[code] * scale for code in row] for row, scale in zip(codes, scales, strict=True)]
        got = decoded[index][0, head, tile * 16 : tile * 16 + 16]
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_encode_writes_the_named_tiles_and_nothing_else(fmt: Format) -> None:
    layout = PageLayout(fmt, HEADS, 32, 48)
    page_ids, tile_ids = torch.tensor([4, 1, 4]), torch.tensor([2, 0, 1])
    key, value = gaussian(3, HEADS, 16, 32), gaussian(3, HEADS, 16, 32, seed=1)
    images = []
    for poison in (0x00, 0xFF):
        pages = torch.full((6, layout.page_bytes), poison, dtype=torch.uint8)
        OPS.encode(key, value, page_ids, tile_ids, pages, layout)
        images.append(pages)
    named = torch.zeros(6, layout.page_bytes, dtype=torch.bool)
    for name in layout.field_offsets_bytes:
        packing.field(named, layout, name)[page_ids, :, tile_ids] = True
    # A named byte does not depend on what lay there; any other byte is what lay there.
    assert torch.equal(images[0] == images[1], named)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_one_call_equals_tile_by_tile(fmt: Format) -> None:
    layout = PageLayout(fmt, HEADS, 64, 64)
    key, value = (gaussian(12, HEADS, 16, 64, seed=s) * gaussian(12, HEADS, 16, 1, seed=9).exp() for s in (1, 2))
    page_ids, tile_ids = torch.tensor([3, 0, 7]).repeat_interleave(4), torch.arange(4).repeat(3)
    together, apart, again = (torch.zeros(8, layout.page_bytes, dtype=torch.uint8) for _ in range(3))
    OPS.encode(key, value, page_ids, tile_ids, together, layout)
    OPS.encode(key, value, page_ids, tile_ids, again, layout)
    for i in reversed(range(12)):
        one = slice(i, i + 1)
        OPS.encode(key[one], value[one], page_ids[one], tile_ids[one], apart, layout)
    assert int((together != apart).sum()) == budgets.BACKEND_BYTES_DIFFER
    assert int((together != again).sum()) == budgets.BACKEND_BYTES_DIFFER


@pytest.mark.parametrize("fmt", [Format(4, 3), RAW], ids=str)
def test_strides_and_narrow_dtypes_change_nothing(fmt: Format) -> None:
    token_major = gaussian(6, 16, HEADS, 64).bfloat16()
    head_major = token_major.transpose(1, 2)
    want = round_trip(head_major.float().contiguous(), head_major.float().contiguous(), fmt)
    got = round_trip(head_major, head_major, fmt)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_tiles_and_no_pages(fmt: Format) -> None:
    layout = PageLayout(fmt, HEADS, 64, 48)
    pages = torch.full((2, layout.page_bytes), 255, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    OPS.encode(gaussian(0, HEADS, 16, 64), gaussian(0, HEADS, 16, 64), none, none, pages, layout)
    assert torch.all(pages == 255)
    assert OPS.decode(pages, none, layout)[0].shape == (0, HEADS, 48, 64)


@pytest.mark.parametrize("fmt", FORMATS[:-1], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-12, 65504.0, 1e30, float("inf"), float("nan")])
def test_any_input_decodes_to_finite_values(fmt: Format, size: float) -> None:
    x = gaussian(2, HEADS, 16, 32).sign() * size
    for decoded in round_trip(x, x, fmt):
        assert decoded.isfinite().all()
        if size < 1e-10:
            assert float(decoded.abs().max()) < 1e-6


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_scales_of_a_tile_reach_down_fifteen_steps(bits: int) -> None:
    reach = 2 ** (15 * SCALE_STEP_LOG2)
    sizes = reach ** -torch.rand(32, 1, 16, 1, generator=torch.Generator().manual_seed(3)).mul(0.95)
    sizes[:, :, 3] = 1.0  # one huge token; the others are all over what the nibbles reach
    x = gaussian(32, 1, 16, 256)
    for decoded, budget in zip(
        round_trip(x * sizes, x * sizes, Format(bits, bits)),
        (budgets.FORMAT_KEY_RMS[bits], budgets.FORMAT_VALUE_RMS[bits]),
        strict=True,
    ):
        assert rms_error(decoded / sizes, x) <= budget
    # Below that a token gets the smallest scale: its error is that of the smallest level, not more.
    sizes = torch.full_like(sizes, reach**-2)
    sizes[:, :, 3] = 1.0
    floor = codec.levels(bits)[2 ** (bits - 1)] / reach * 1.3
    for decoded in round_trip(x * sizes, x * sizes, Format(bits, bits)):
        assert float((decoded - x * sizes)[:, :, 4:].abs().max()) <= floor


def test_a_poisoned_tile_harms_no_other_tile() -> None:
    x = gaussian(3, HEADS, 16, 64)
    want = round_trip(x, x, Format(4, 3))
    x[1] = float("nan")
    for got, expected in zip(round_trip(x, x, Format(4, 3)), want, strict=True):
        assert torch.equal(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate_is_an_orthonormal_hadamard_matrix_in_each_power_of_two(head_dim: int) -> None:
    matrix = OPS.rotate(torch.eye(head_dim)).double()
    start = 0
    for block in (1 << bit for bit in reversed(range(10)) if head_dim >> bit & 1):  # 160 = 128 + 32
        for row, column in product(range(block), range(head_dim)):
            inside = start <= column < start + block
            entry = (-1) ** (row & column - start).bit_count() * block**-0.5 if inside else 0
            assert abs(float(matrix[start + row, column]) - entry) < 1e-7
        start += block
    assert start == head_dim
    x = gaussian(5, 3, head_dim)
    torch.testing.assert_close(OPS.rotate(OPS.rotate(x)), x, rtol=0, atol=budgets.BACKEND_ROTATE)
    assert OPS.rotate(x.bfloat16()).dtype == torch.bfloat16
