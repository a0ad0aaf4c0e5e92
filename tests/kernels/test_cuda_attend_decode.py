"""The CUDA attend_decode, run on fibers, against float64 twins: every format and head_dim, all a context can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltastore_kernels.context import Scoring
from deltastore_kernels.cuda_build import HEAD_DIMS
from deltastore_kernels.layout import RAW, Format
from tests import budgets
from tests.kernels.attention_case import OPS, Case, gaussian, store
from tests.kernels.cpu_case import attend_float64, context_of, query_of, request_rms
from tests.kernels.cuda.fiber_case import FORMATS, attend_decode
from tests.kernels.paged_context import PagedContext, run_decode

K4V2, K3V2, K4V3 = Format(4, 2), Format(3, 2), Format(4, 3)
LENGTHS = (1, 15, 16, 17, 97, 200)

CASES = [
    *(Case(fmt, LENGTHS, heads=1, group=4) for fmt in FORMATS),
    *(Case(fmt, (17, 97, 130), heads=1, group=4, head_dim=128) for fmt in FORMATS),
    *(Case(fmt, (33, 97), heads=1, group=2, head_dim=256) for fmt in FORMATS),
    *(Case(fmt, (97, 16), heads=2, group=group) for fmt in (K4V2, RAW) for group in (1, 5, 7, 8, 9, 16, 17)),
    *(Case(K4V2, (100, 48, 7, 300), page_tokens=page_tokens) for page_tokens in (16, 48, 64, 112)),
    *(Case(fmt, (1, 17, 97, 160, 400), window_left=w) for fmt in (K4V2, RAW) for w in (0, 5, 40, 1000)),
    *(Case(K4V2, (1, 100, 96, 130), window_left=w, page_tokens=16) for w in (0, 15, 16, 17, 40)),
    *(Case(fmt, (97, 300), soft_cap=cap, window_left=w) for fmt in (K4V2, RAW) for cap, w in ((2.0, None), (30.0, 40))),
    *(Case(fmt, (5, 17, 97, 160), sink_tokens=s) for fmt in (K4V2, RAW) for s in (1, 4, 16)),
    *(Case(K4V2, (5, 17, 97, 160), sink_tokens=4, window_left=w) for w in (0, 15, 95, 96, 98, 1000)),
    *(Case(K3V2, (97, 16), dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
]


def agree(got: tuple[torch.Tensor, torch.Tensor], case: Case, query: torch.Tensor) -> None:
    out, lse = got
    assert out.dtype == case.dtype
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(case.dtype).removeprefix("torch."), 0.0)
    want_out, want_lse = attend_float64(query.float(), case)
    if case.fmt.is_raw:
        near = budgets.BACKEND_ATTEND_CUDA_RAW
        torch.testing.assert_close(out.double(), want_out, rtol=rounding + near, atol=near)
        torch.testing.assert_close(lse.double(), want_lse, rtol=near, atol=near)
        return
    # NaN passes no comparison that has to hold.
    assert float(request_rms(out, want_out).max()) <= budgets.BACKEND_ATTEND_INT16 + rounding
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT16_LSE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_float64_twin(case: Case) -> None:
    query = query_of(case)
    agree(attend_decode(query, context_of(case), case.scoring), case, query)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize(
    "case",
    [
        Case(K4V2, (1, 16, 97, 700), heads=1, group=4, sink_tokens=1),
        Case(RAW, (1, 16, 97, 300), heads=1, group=4, window_left=150),
    ],
    ids=str,
)
def test_splits_change_nothing(case: Case, splits: int) -> None:
    query = query_of(case)
    agree(attend_decode(query, context_of(case), case.scoring, splits), case, query)


@pytest.mark.parametrize("seed", range(1, 7))
def test_any_schedule_of_threads_gives_the_same_bits(seed: int) -> None:
    case = Case(K4V2, (97, 600), heads=1, group=4, sink_tokens=1)
    query, context = query_of(case), context_of(case)
    want = attend_decode(query, context, case.scoring, splits=2, seed=0)
    got = attend_decode(query, context, case.scoring, splits=2, seed=seed)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_agrees_with_the_reference_operation() -> None:
    case = Case(K4V2, LENGTHS, head_dim=128, heads=1, group=4)
    out, _ = attend_decode(query_of(case), context_of(case), case.scoring)
    want, _ = run_decode(OPS, query_of(case), context_of(case), case.scoring)
    assert float(request_rms(out, want.double()).max()) <= budgets.BACKEND_ATTEND_INT16


def dominated() -> tuple[torch.Tensor, PagedContext, Scoring]:
    """One token with most of the weight and a thousand with 1/1000 of its."""
    case = Case(Format(4, 4), (1024,), heads=1, group=1)
    keys, values = torch.zeros(1, 1024, 64), gaussian(1, 1, 64, seed=3).expand(1, 1024, 64).clone()
    keys[:, 5], values[:, 5] = 8.0, gaussian(64, seed=4)
    return torch.ones(1, 1, 64), store(case, [keys.half()], [values.half()]), Scoring(6.9 / 512)


def test_small_weights_keep_their_mass() -> None:
    query, context, scoring = dominated()
    out, _ = attend_decode(query, context, scoring)
    want, _ = run_decode(OPS, query, context, scoring)
    assert float(request_rms(out, want.double()).max()) <= budgets.BACKEND_ATTEND_INT16


def test_values_of_very_different_sizes() -> None:
    """Weights are relative to the largest score plus value scale of a block; sums are not."""
    case = Case(K4V2, (256,), heads=1, group=4)
    sizes = torch.logspace(-4, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    values = gaussian(1, 256, 64, seed=2) * sizes[:, None]
    context = store(case, [gaussian(1, 256, 64, seed=1).half()], [values.half()])
    query = query_of(case)
    out, lse = attend_decode(query, context, case.scoring)
    want_out, want_lse = run_decode(OPS, query, context, case.scoring)
    assert float(request_rms(out, want_out.double()).max()) <= budgets.BACKEND_ATTEND_INT16
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT16_LSE


def test_requests_without_tokens() -> None:
    case = Case(K4V2, (20, 5))
    context = context_of(case)
    empty = replace(context, packed_tokens=torch.tensor([0, 0]), frame_tokens=torch.tensor([0, 5]))
    out, lse = attend_decode(query_of(case), empty, case.scoring, splits=2)
    assert torch.all(out[0] == 0)
    assert torch.all(lse[0] == -torch.inf)
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_query_poisons_its_own_head_only(poison: float) -> None:
    case = Case(K4V2, (97, 100))
    query = query_of(case)
    query[1, 2] *= 1e-3  # not the largest of its group, on which the others' rounding depends
    want, _ = attend_decode(query, context_of(case), case.scoring)
    query[1, 2, 7] = poison
    out, _ = attend_decode(query, context_of(case), case.scoring)
    assert not out[1, 2].isfinite().any()
    out[1, 2] = want[1, 2]
    assert torch.equal(out, want)


def test_a_query_of_zeros_averages() -> None:
    case = Case(K4V2, (97,))
    query = torch.zeros_like(query_of(case))
    out, lse = attend_decode(query, context_of(case), case.scoring)
    want_out, _ = attend_float64(query, case)
    assert float(request_rms(out, want_out).max()) <= budgets.BACKEND_ATTEND_INT16
    torch.testing.assert_close(lse, torch.tensor(97.0).log().expand_as(lse))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_only_own_memory_is_read(head_dim: int) -> None:
    """fibers.h fails on any read outside the tensors; a page table that points there shows that it does."""
    case = Case(K4V2, (97,), head_dim=head_dim)
    context = context_of(case)
    context = replace(context, page_table=torch.full_like(context.page_table, len(context.pages)))
    with pytest.raises(RuntimeError, match="outside of what may be read"):
        attend_decode(query_of(case), context, case.scoring)
