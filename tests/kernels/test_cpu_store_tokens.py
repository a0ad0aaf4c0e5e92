"""The compiled store_tokens against its twin: pages, frames and sinks after steps of every kind."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from deltastore_kernels import native
from deltastore_kernels.context import LayerStore
from deltastore_kernels.layout import NO_PAGE, RAW, Format
from deltastore_kernels.ops.store_tokens import cpu, reference
from tests import budgets
from tests.kernels.attention_case import gaussian
from tests.kernels.cpu_case import isa
from tests.kernels.store_case import FRAMES, HEADS, PAGES, SINKS, a_step, copied, make_store, tensors

assert isa  # fixture

FORMATS, HEAD_DIMS = (Format(4, 3), Format(3, 2), RAW), (32, 64, 96, 128, 256, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_equal(ours: LayerStore, twins: LayerStore) -> None:
    pages, *raw = zip(tensors(ours), tensors(twins), strict=True)
    differ = int((pages[0] != pages[1]).sum())
    assert differ <= (0 if ours.layout.format.is_raw else 1 + budgets.BACKEND_CODES_DIFFER * pages[0].numel())
    for mine, theirs in raw:
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("fmt", "head_dim", "dtype"),
    list(
        product((Format(4, 3), Format(3, 2), RAW), (32, 64, 128, 256), (torch.float32, torch.bfloat16, torch.float16))
    ),
    ids=str,
)
def test_it_stores_what_the_twin_stores(fmt: Format, head_dim: int, dtype: torch.dtype, isa: str) -> None:
    for seed, (tokens, tiles) in enumerate([(1, 0), (1, 1), (37, 9), (200, 30)]):
        # Keys and values are slices of one projection, as models give them.
        both = gaussian(tokens, 2 * HEADS, head_dim, seed=seed).to(dtype)
        key, value = both[:, :HEADS], both[:, HEADS:]
        ours = make_store(fmt, head_dim)
        twins = copied(ours)
        writes = a_step(tokens, tiles, seed)
        cpu.store_tokens(key, value, writes, ours)
        reference.store_tokens(key, value, writes, twins)
        check_equal(ours, twins)


def test_coarse_pages(isa: str) -> None:
    for seed, (tokens, tiles) in enumerate([(1, 1), (200, 30)]):
        key, value = (gaussian(tokens, HEADS, 64, seed=seed + 20 * side) for side in (1, 2))
        ours = make_store(Format(4, 3), 64, coarse=Format(3, 2))
        twins, writes = copied(ours), a_step(tokens, tiles, seed, coarse=True)
        assert tiles == 1 or (writes.page_ids < NO_PAGE).any()
        cpu.store_tokens(key, value, writes, ours)
        reference.store_tokens(key, value, writes, twins)
        check_equal(ours, twins)
        by_hand = copied(make_store(Format(3, 2), 64))
        only_coarse = torch.where(writes.page_ids < NO_PAGE, writes.page_ids + PAGES, NO_PAGE)
        reference.store_tokens(key, value, replace(writes, page_ids=only_coarse), by_hand)
        assert torch.equal(twins.coarse.pages, by_hand.pages)


def test_shaped_keys_and_bad_numbers(isa: str) -> None:
    ours = make_store(Format(3, 2), 64, shaped=True)
    twins = copied(ours)
    key, value = gaussian(40, HEADS, 64, seed=8), gaussian(40, HEADS, 64, seed=9)
    key[3, 1, 5], value[7, 0, 2], key[9, 2] = float("nan"), float("inf"), 1e6
    writes = a_step(40, 12, seed=3)
    cpu.store_tokens(key, value, writes, ours)
    reference.store_tokens(key, value, writes, twins)
    for mine, theirs in list(zip(tensors(ours), tensors(twins), strict=True))[1:]:
        assert torch.equal(mine[1:], theirs[1:])
        assert mine.isfinite().all()
    assert (ours.pages != twins.pages).float().mean() <= budgets.BACKEND_SHAPED_VECTORS_DIFFER


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_ids", PAGES), ("page_ids", -2), ("tile_ids", 2), ("tile_frames", FRAMES), ("tile_sources", 37),
        ("rest_rows", 37), ("rest_frames", -1), ("rest_lanes", 16), ("sink_rows", 36), ("sink_ids", SINKS),
    ],
)  # fmt: skip
def test_what_points_outside_is_refused_before_anything_is_written(name: str, value: int) -> None:
    writes, store = a_step(37, 9, seed=2), make_store(Format(4, 2), 64)
    writes.tile_sources[:, 0] = -1  # every tile takes something of its frame
    getattr(writes, name).view(-1)[-1] = value
    before = copied(store)
    key = gaussian(37, HEADS, 64, seed=1)
    with pytest.raises(ValueError, match=str(abs(value))):
        cpu.store_tokens(key, key, writes, store)
    for mine, was in zip(tensors(store), tensors(before), strict=True):
        assert torch.equal(mine, was)


def test_rows_of_another_shape_are_refused() -> None:
    writes, store = a_step(4, 1, seed=2), make_store(Format(4, 2), 64)
    with pytest.raises(ValueError, match="must be"):
        native.store_tokens(torch.zeros(4, HEADS + 1, 64), torch.zeros(4, HEADS, 64), writes, store)
    with pytest.raises(ValueError, match="rest_rows"):
        bad = replace(writes, rest_rows=writes.rest_rows.int())
        cpu.store_tokens(torch.zeros(4, HEADS, 64), torch.zeros(4, HEADS, 64), bad, store)
