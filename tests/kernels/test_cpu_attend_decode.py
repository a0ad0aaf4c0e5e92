"""The compiled attend_decode on every instruction set of this machine, against float64 twins."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from deltastore_kernels.context import Scoring
from deltastore_kernels.layout import PACKED_BITS, RAW, Format
from tests import budgets
from tests.kernels.attention_case import OPS, Case, gaussian
from tests.kernels.cpu_case import (
    CPU,
    attend_float64,
    context_of,
    float_budget,
    fresh_memory_is_nan,
    int8_query,
    isa,
    query_of,
    request_rms,
)
from tests.kernels.head_dims import HEAD_DIMS
from tests.kernels.paged_context import run_decode

assert fresh_memory_is_nan, isa  # fixtures

K4V2, K3V2, K4V3 = Format(4, 2), Format(3, 2), Format(4, 3)
FORMATS = [Format(*bits) for bits in product(PACKED_BITS, repeat=2)]
LENGTHS = (1, 15, 16, 17, 97, 1025)
MIXED = (1, 15, 16, 17, 97, 64, 2, 33, 128, 5, 48, 100, 31, 65, 16, 80, 79)  # batch 17

SHAPES = [
    *(Case(fmt, LENGTHS, head_dim=head_dim) for fmt, head_dim in product((*FORMATS, RAW), HEAD_DIMS)),
    *(Case(fmt, (97, 16, 130), group=group) for fmt, group in product((K4V2, K3V2, RAW), (1, 2, 4, 5, 8, 16, 17, 33))),
    *(Case(K4V2, (100, 48, 7, 300), heads=heads, page_tokens=p) for heads, p in product((1, 3), (16, 48, 64))),
    *(Case(fmt, (1, 17, 97, 160, 400), window_left=w) for fmt, w in product((K4V3, RAW), (0, 5, 40, 100, 1000))),
    *(Case(K4V3, (1, 100, 96, 130), window_left=w, page_tokens=16) for w in (0, 15, 16, 17, 40)),
    *(Case(fmt, (97, 300), soft_cap=2.0) for fmt in (K4V2, RAW)),
    *(Case(fmt, (97, 300), soft_cap=30.0, window_left=40, page_tokens=48) for fmt in (K4V2, RAW)),
    *(Case(fmt, LENGTHS, sink_tokens=1, head_dim=d) for fmt, d in product((K4V2, K3V2, Format(2, 4)), HEAD_DIMS)),
    *(Case(K4V3, (5, 17, 97, 160, 400), sink_tokens=4, window_left=w) for w in (0, 15, 95, 96, 98, 1000)),
    *(Case(K4V3, (97, 300, 130), sink_tokens=s, group=g, soft_cap=2.0) for s, g in ((1, 1), (4, 9), (16, 33))),
    Case(K4V2, MIXED, sink_tokens=1, page_tokens=16),
    Case(K4V2, MIXED),
    Case(K3V2, MIXED, head_dim=128, heads=1, group=2, window_left=40, page_tokens=16),
    *(Case(K4V3, MIXED, coarse=K3V2, page_tokens=p, window_left=w) for p, w in product((16, 64), (None, 40))),
    *(Case(K4V3, (700, 97), coarse=Format(2, 2), page_tokens=p, group=g, sink_tokens=1) for p, g in ((16, 9), (48, 1))),
    Case(K4V2, (700, 97), coarse=K4V2, page_tokens=16, head_dim=128),
    *(Case(K4V2, (97, 16), dtype=dtype) for dtype in (torch.float16, torch.bfloat16)),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_equals_the_float64_twins(case: Case, isa: str) -> None:
    query = query_of(case)
    out, lse = run_decode(CPU, query, context_of(case), case.scoring)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(case.dtype).removeprefix("torch."), 0.0)
    near = float_budget(isa)

    # Against the twin that rounds the query alike: scores are exact, weights are not.
    want_out, want_lse = attend_float64(query.float(), case, None if case.fmt.is_raw else int8_query(query))
    torch.testing.assert_close(lse.double(), want_lse, rtol=near, atol=near)
    if case.fmt.is_raw:
        torch.testing.assert_close(out.double(), want_out, rtol=rounding + near, atol=near)
        return
    assert float(request_rms(out, want_out).max()) <= budgets.BACKEND_ATTEND_INT8_WEIGHTS + rounding

    # Against the definition.
    want_out, want_lse = attend_float64(query.float(), case)
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT8_LSE
    assert float(request_rms(out, want_out).max()) <= budgets.BACKEND_ATTEND_INT8 + rounding


@pytest.mark.parametrize("fmt", [K4V2, RAW], ids=str)
def test_agrees_with_the_reference_operation(fmt: Format, isa: str) -> None:
    case = Case(fmt, LENGTHS, head_dim=128, group=4)
    out, lse = run_decode(CPU, query_of(case), context_of(case), case.scoring)
    want_out, want_lse = run_decode(OPS, query_of(case), context_of(case), case.scoring)
    assert float(request_rms(out, want_out.double()).max()) <= budgets.BACKEND_ATTEND_INT8
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT8_LSE


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case",
    [
        Case(K4V2, (4097,), heads=1, group=4),
        Case(K4V2, (4097,), heads=3),
        Case(RAW, (1500,), heads=3, group=1),
        Case(K4V2, (1500, 1, 700, 40, 900)),
        Case(K4V2, (4097, 2048), window_left=1500),
        Case(K4V2, (1, 900, 1, 1, 16, 700, 1, 3000, 1)),
    ],
    ids=str,
)
def test_threads_share_one_request_and_change_nothing_but_the_order_of_sums(case: Case, isa: str, threads) -> None:
    query, results = query_of(case), {}
    for count in (1, 2, 3, 7):
        threads(count)
        results[count] = run_decode(CPU, query, context_of(case), case.scoring)
        again = run_decode(CPU, query, context_of(case), case.scoring)
        assert torch.equal(results[count][0], again[0])
        assert torch.equal(results[count][1], again[1])
    near = float_budget(isa)
    for count in (2, 3, 7):
        torch.testing.assert_close(results[count][1], results[1][1], rtol=near, atol=near)
        # How finely a block's weights are rounded depends on the sum so far, which starts anew.
        rms = float(request_rms(results[count][0], results[1][0].double()).max())
        assert rms <= (near if case.fmt.is_raw else budgets.BACKEND_ATTEND_INT8_WEIGHTS)


def test_requests_without_tokens_lie_between_threads_work(isa: str, threads) -> None:
    case = Case(K4V2, (0, 900, 0, 0, 16, 700, 0, 3000, 0))
    query, full = query_of(case), [1, 4, 5, 7]
    threads(7)
    out, lse = run_decode(CPU, query, context_of(case), case.scoring)
    threads(1)
    want, _ = run_decode(CPU, query, context_of(case), case.scoring)
    assert float(request_rms(out[full], want[full].double()).max()) <= budgets.BACKEND_ATTEND_INT8_WEIGHTS
    empty = [0, 2, 3, 6, 8]
    assert torch.all(out[empty] == 0)
    assert torch.all(lse[empty] == -torch.inf)


def test_a_requests_result_does_not_depend_on_its_batch(isa: str) -> None:
    case = Case(K4V2, MIXED)
    query, context = query_of(case), context_of(case)
    out, lse = run_decode(CPU, query, context, case.scoring)
    for i in range(len(MIXED)):
        row = slice(i, i + 1)
        names = ("page_table", "packed_tokens", "frame_ids", "frame_tokens")
        alone = replace(context, **{name: getattr(context, name)[row] for name in names})
        one = run_decode(CPU, query[row], alone, case.scoring)
        assert torch.equal(one[0], out[row])
        assert torch.equal(one[1], lse[row])


def test_small_weights_keep_their_mass(isa: str) -> None:
    """One token with most of the weight and a thousand with 1/1000 of its: plain rounding to 8 bits
    would drop all of those that share a block with it."""
    case = Case(Format(4, 4), (1024,), heads=1, group=1)
    keys, values = torch.zeros(1, 1024, 64), gaussian(1, 1, 64, seed=3).expand(1, 1024, 64).clone()
    keys[:, 5], values[:, 5] = 8.0, gaussian(64, seed=4)
    from tests.kernels.attention_case import store

    context = store(case, [keys.half()], [values.half()])
    query = torch.ones(1, 1, 64)
    scoring = Scoring(6.9 / 512)
    out, _ = run_decode(CPU, query, context, scoring)
    want, _ = run_decode(OPS, query, context, scoring)
    assert float(request_rms(out, want.double()).max()) <= budgets.BACKEND_ATTEND_INT8_WEIGHTS


def test_integer_index_dtypes_and_strides(isa: str) -> None:
    case = Case(K4V2, (97, 40))
    context, query = context_of(case), query_of(case)
    narrow = replace(
        context,
        page_table=context.page_table.int(),
        packed_tokens=context.packed_tokens.int(),
        frame_ids=context.frame_ids.int(),
        frame_tokens=context.frame_tokens.int(),
    )
    strided = query.repeat_interleave(2, dim=2)[:, :, ::2]
    want = run_decode(CPU, query, context, case.scoring)
    assert torch.equal(run_decode(CPU, strided, narrow, case.scoring)[0], want[0])


def test_no_requests_and_requests_without_tokens(isa: str) -> None:
    case = Case(K4V2, (20, 5))
    context = context_of(case)
    none = run_decode(CPU, query_of(case)[:0], context, case.scoring)
    assert (len(none[0]), len(none[1])) == (0, 0)
    empty = replace(context, packed_tokens=torch.tensor([0, 0]), frame_tokens=torch.tensor([0, 5]))
    out, lse = run_decode(CPU, query_of(case), empty, case.scoring)
    assert torch.all(out[0] == 0)
    assert torch.all(lse[0] == -torch.inf)
    assert torch.equal(out[1], run_decode(CPU, query_of(case), context, case.scoring)[0][1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_query_poisons_its_own_head_only(poison: float, isa: str) -> None:
    case = Case(K4V2, (97, 100))
    query = query_of(case)
    want, _ = run_decode(CPU, query, context_of(case), case.scoring)
    query[1, 2, 7] = poison
    out, _ = run_decode(CPU, query, context_of(case), case.scoring)
    assert not out[1, 2].isfinite().any()
    out[1, 2] = want[1, 2]
    assert torch.equal(out, want)


def test_a_query_of_zeros_averages(isa: str) -> None:
    case = Case(K4V2, (97,))
    query = torch.zeros_like(query_of(case))
    out, lse = run_decode(CPU, query, context_of(case), case.scoring)
    want_out, _ = attend_float64(query, case)
    assert float(request_rms(out, want_out).max()) <= budgets.BACKEND_ATTEND_INT8_WEIGHTS
    torch.testing.assert_close(lse, torch.tensor(97.0).log().expand_as(lse))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"page_table": torch.tensor([[10**6] * 4] * 2)}, "page 1000000"),
        ({"page_table": torch.tensor([[-1] * 4] * 2)}, "page -1"),
        ({"page_table": torch.zeros(2, 1, dtype=torch.int64)}, "ends after 1 pages"),
        ({"packed_tokens": torch.tensor([96, 17])}, "17 packed tokens"),
        ({"frame_ids": torch.tensor([77, 0])}, "frame 77"),
        ({"frame_tokens": torch.tensor([16, 0])}, "16 in its frame"),
    ],
)
def test_refuses_what_would_read_elsewhere(change: dict, says: str) -> None:
    case = Case(K4V2, (97, 96))
    with pytest.raises(ValueError, match=says):
        run_decode(CPU, query_of(case), replace(context_of(case), **change), case.scoring)
