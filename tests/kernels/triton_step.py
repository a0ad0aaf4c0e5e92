"""enter, store_tokens and a decode step's leave in Triton against their twins. Started by test_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from triton.runtime import interpreter

from deltastore_kernels import ops
from deltastore_kernels.basis import Basis
from deltastore_kernels.context import LayerStore, Scoring
from deltastore_kernels.layout import RAW, Format, PageLayout
from deltastore_kernels.ops._triton_leave import leave
from deltastore_kernels.token_writes import TokenWrites
from sglang_deltastore.store.writes import plan_decode_writes, plan_draft_writes, plan_writes
from tests import budgets
from tests.kernels import store_case
from tests.kernels.attention_case import Case, gaussian, key_basis
from tests.kernels.cpu_case import context_of, query_of
from tests.kernels.cuda import fiber_case
from tests.kernels.triton_case import DEVICE, ON_GPU, TRITON, module, on_device

TWIN = ops.load("reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one unit in the last place


def on_basis(basis: Basis) -> Basis:
    """The same on the device under test."""
    moved = Basis(TRITON, None, basis.layout)
    moved.key_basis = basis.key_basis and basis.key_basis.to(DEVICE)
    if basis.key_basis is not None:
        moved.rotated_mean = basis.rotated_mean.to(DEVICE)
    return moved


def a_basis(heads: int, key_dim: int, value_dim: int, head_dim: int, calibrated: bool) -> Basis:
    layout = PageLayout(RAW, heads, head_dim, 16, key_dim, value_dim)
    return Basis(TWIN, key_basis(heads, key_dim, seed=1) if calibrated else None, layout)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dims", [(32, 32, 32), (64, 64, 64), (80, 80, 128), (48, 32, 64), (256,) * 3, (512,) * 3])
def test_enter(dims: tuple[int, int, int], calibrated: bool) -> None:
    """Queries, keys and values are slices of one product, and more rows than a program takes."""
    key_dim, value_dim, _ = dims
    basis, widths = a_basis(2, *dims, calibrated), (6 * key_dim, 2 * key_dim, 2 * value_dim)
    for dtype, tokens in zip(DTYPES, (37, 1, 70), strict=True):
        product_ = gaussian(tokens, sum(widths) + 5, seed=3).to(dtype)[:, 5:]
        sides = [side.unflatten(1, (-1, dim)) for side, dim in
                 zip(product_.split(widths, 1), (key_dim, key_dim, value_dim), strict=True)]  # fmt: skip
        near = budgets.BACKEND_BASIS if calibrated else budgets.BACKEND_ROTATE
        got, want = TRITON.enter(*map(on_device, sides), on_basis(basis)), TWIN.enter(*sides, basis)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == dtype
            assert ours.is_contiguous()
            torch.testing.assert_close(ours.cpu().float(), theirs.float(), rtol=ROUNDING[dtype], atol=near)


def test_enter_with_nothing() -> None:
    nothing = torch.zeros(0, 6, 64), torch.zeros(0, 2, 64), torch.zeros(0, 2, 64)
    got = TRITON.enter(*map(on_device, nothing), on_basis(a_basis(2, 64, 64, 64, True)))
    assert [side.shape for side in got] == [(0, 6, 64), (0, 2, 64), (0, 2, 64)]


@pytest.fixture(params=[False, True], ids=["", "last-program-first"])
def any_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch's programs run in any order: the first or the last first. A GPU has its own."""
    if request.param and not ON_GPU:
        builder = interpreter.interpreter_builder
        native = builder.set_grid_idx
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, *rest: native(builder.grid_dim[0] - 1 - x, *rest), raising=False
        )


def stored_alike(ours: LayerStore, key: torch.Tensor, value: torch.Tensor, writes: TokenWrites) -> None:
    """Every byte that the twin writes, and no other. On a GPU exp2 and log2 are approximations of their own."""
    device, twins = on_device(store_case.copied(ours)), store_case.copied(ours)
    TRITON.store_tokens(on_device(key), on_device(value), on_device(writes), device)
    TWIN.store_tokens(key, value, writes, twins)
    allowed = [16 if ON_GPU else 0, 0, 0, 0, 0]
    for got, want, was, most in zip(*map(store_case.tensors, (device, twins, ours)), allowed, strict=True):
        assert int((got.cpu() != want).sum()) <= most
        was.copy_(want)


STORES = [
    (Format(4, 3), 64, False, torch.float32), (Format(2, 4), 32, False, torch.bfloat16),
    (Format(3, 2), 32, True, torch.float16), (Format(4, 2), 32, True, torch.bfloat16), (RAW, 128, False, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "head_dim", "shaped", "dtype"), STORES, ids=str)
def test_store_tokens_writes_the_twins_bytes(
    fmt: Format, head_dim: int, shaped: bool, dtype: torch.dtype, any_order: None
) -> None:
    for seed, (tokens, tiles) in enumerate([(1, 0), (1, 1), (20, 4)]):
        # Keys and values are slices of one product, some of them bad numbers.
        both = gaussian(tokens, 2 * store_case.HEADS, head_dim, seed=seed).to(dtype)
        both[tokens // 2, 1, 5], both[0, 4, 2], both[-1, 2] = torch.nan, torch.inf, 7e4
        sides = both[:, : store_case.HEADS], both[:, store_case.HEADS :]
        stored_alike(store_case.make_store(fmt, head_dim, shaped), *sides, store_case.a_step(tokens, tiles, seed))


@pytest.mark.parametrize("few_tiles", [0, 1000])
def test_a_tile_s_keys_are_shaped_at_once_or_in_quarters(few_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = launches(monkeypatch, "store_tokens", "store_rows")
    monkeypatch.setattr(module("encode"), "FEW_TILES", few_tiles)
    sides = [gaussian(20, store_case.HEADS, 32, seed=seed) for seed in (7, 8)]
    stored_alike(store_case.make_store(Format(4, 3), 32, True), *sides, store_case.a_step(20, 4, seed=2))
    assert [grid[2] for grid in grids] == [4 if few_tiles else 1] * 2


def launches(monkeypatch: pytest.MonkeyPatch, of: str, kernel: str) -> list[tuple[int, ...]]:
    """The grids of a kernel's launches from now on."""
    grids: list[tuple[int, ...]] = []
    native = getattr(module(of), kernel)

    class Noting:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return native[grid]

    monkeypatch.setattr(module(of), kernel, Noting())
    return grids


def test_frames_are_read_before_they_are_filled_again(any_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt behind an unfinished tile takes that from its frame, and leaves its own rest in the same lanes; a decode
    step's tiles and tokens share frames, but no lane, and take one launch."""
    grids = launches(monkeypatch, "store_tokens", "store_rows")
    store = store_case.make_store(Format(4, 2), 32)
    frames, table = torch.tensor([1, 2, 3]), 1 + torch.arange(9).view(3, 3)
    old, new, sinks = torch.tensor([5, 15, 0]), torch.tensor([14, 20, 17]), torch.tensor([0, 0, 2])
    size = int(new.sum()), store_case.HEADS, 32
    writes = plan_writes(old, new, frames, table, store_case.PAGE_TOKENS, sinks)
    stored_alike(store, gaussian(*size, seed=5), gaussian(*size, seed=6), writes)
    assert grids == [(4, store_case.HEADS, 1), (8, store_case.HEADS, 1)]
    grids.clear()
    total = old + new
    for step in range(14):  # over the end of each request's tile
        total = total + 1
        sides = [gaussian(3, store_case.HEADS, 32, seed=10 + step + i) for i in range(2)]
        stored_alike(store, *sides, plan_decode_writes(total, frames, table, store_case.PAGE_TOKENS))
    assert grids == 14 * [(6, store_case.HEADS, 1)]


@pytest.mark.parametrize(("fmt", "head_dim", "shaped", "dtype"), STORES, ids=str)
def test_drafts_are_stored_in_one_launch(
    fmt: Format, head_dim: int, shaped: bool, dtype: torch.dtype, any_order: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of a tile that is completed stay in its frame as well, and those behind it go to the other one."""
    grids = launches(monkeypatch, "store_tokens", "store_rows")
    store = store_case.make_store(fmt, head_dim, shaped)
    rows, table, drafts = torch.tensor([1, 2]), 1 + torch.arange(6).view(2, 3), 5
    for step, stored in enumerate([(9, 12), (13, 14), (14, 15), (31, 16)]):
        sides = [gaussian(2 * drafts, store_case.HEADS, head_dim, seed=step + i).to(dtype) for i in range(2)]
        total = torch.tensor(stored) + drafts
        stored_alike(store, *sides, plan_draft_writes(total, rows, table, store_case.PAGE_TOKENS, drafts, 3))
    assert grids == 4 * [(12, store_case.HEADS, 4 if shaped else 1)]


def parts_of(rows: tuple[int, int], parts: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some parts without tokens, whose outputs are NaN; one row has none at all."""
    log2 = 4 * gaussian(*rows, parts, seed=1)
    log2[gaussian(*rows, parts, seed=2) > 0.8] = -torch.inf
    log2[0, 0], log2[0, 1, 0] = -torch.inf, 100.0
    out = gaussian(*rows, parts, head_dim, seed=3)
    out[log2.isneginf()] = torch.nan
    return out, log2


SINK_LOGITS = torch.tensor([-torch.inf, -3.0, 0.0, 2.0, 5.0, 40.0])


@pytest.mark.parametrize("parts", [1, 3, 16, 50])
@pytest.mark.parametrize(
    ("dims", "dtype"), [((64, 64, 64), torch.float32), ((48, 32, 64), torch.bfloat16), ((80, 80, 128), torch.float16)]
)
def test_leave(parts: int, dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    (out, log2), scoring = parts_of((3, 6), parts, dims[-1]), Scoring(0.3)
    query_rot = gaussian(3, 6, dims[-1], seed=4).to(dtype)
    bases = (None, a_basis(2, *dims, False), a_basis(2, *dims, True))
    for basis, sinks in product(bases, (None, SINK_LOGITS.to(dtype))):
        want_out, want_lse = fiber_case.leave(out, log2, query_rot.float(), scoring, basis, sinks)
        moved = None if basis is None else on_basis(basis)
        got = leave(
            *map(on_device, (out, log2, query_rot)), scoring, moved, sinks if sinks is None else on_device(sinks)
        )
        assert got[0].dtype == dtype
        torch.testing.assert_close(
            got[0].cpu().float(), want_out, rtol=ROUNDING[dtype] / 2, atol=budgets.BACKEND_ROTATE
        )
        torch.testing.assert_close(got[1].cpu(), want_lse, rtol=0, atol=budgets.BACKEND_ROTATE)


@pytest.mark.parametrize("sink_logits", [None, SINK_LOGITS.clamp_min(-9)], ids=["", "sink-logits"])
def test_a_decode_step_leaves_as_the_twin_s(sink_logits: torch.Tensor | None) -> None:
    case = Case(Format(4, 3), (1, 97, 200), sink_tokens=1)
    basis = a_basis(case.heads, 64, 48, 64, True)
    context, query, device = context_of(case), query_of(case), on_device(context_of(case))
    want, _ = TWIN.plan_decode(context.step).run(query, context.layer, case.scoring, basis, sink_logits)
    got, _ = TRITON.plan_decode(device.step).run(
        on_device(query), device.layer, case.scoring, on_basis(basis),
        sink_logits if sink_logits is None else on_device(sink_logits),
    )  # fmt: skip
    assert got.shape == want.shape == (3, 6, 48)
    error = (got.cpu() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    # What the logarithm is off moves a sink's share by as much.
    assert float(error.max()) <= budgets.BACKEND_ATTEND_INT15 + budgets.BACKEND_ATTEND_INT15_LSE
