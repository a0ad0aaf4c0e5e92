"""The compiled attend_extend on every instruction set of this machine, against float64 twins."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from deltastore_kernels.layout import PACKED_BITS, RAW, Format
from tests import budgets
from tests.kernels.attention_case import OPS, Case, gaussian
from tests.kernels.cpu_case import (
    CPU,
    context_of,
    extend_float64,
    float_budget,
    fresh_memory_is_nan,
    int8_query,
    isa,
    relative_rms,
)
from tests.kernels.head_dims import HEAD_DIMS
from tests.kernels.paged_context import run_extend

assert fresh_memory_is_nan, isa  # fixtures

K4V2, K3V2, K4V3 = Format(4, 2), Format(3, 2), Format(4, 3)
FORMATS = [Format(*bits) for bits in product(PACKED_BITS, repeat=2)]
MIXED = (1, 15, 16, 17, 97, 64, 2, 33, 128, 5, 48, 100, 31, 65, 16, 80, 79)  # batch 17

# Stored tokens, and how many new ones each request brings.
CASES = [
    *((Case(fmt, (1, 15, 16, 97), head_dim=d), (9, 3, 20, 1)) for fmt, d in product((*FORMATS, RAW), HEAD_DIMS)),
    *((Case(fmt, (0, 0), head_dim=d), (150, 1)) for fmt, d in product((K4V2, RAW), HEAD_DIMS)),  # cold
    *((Case(fmt, (40,), group=group), (18,)) for fmt, group in product((K3V2, RAW), (1, 2, 4, 5, 8, 16, 33))),
    *((Case(K4V3, (0, 17, 100), window_left=w, page_tokens=16), (130, 20, 70)) for w in (0, 5, 15, 16, 40, 64, 1000)),
    *((Case(RAW, (0, 17, 100), window_left=w), (130, 20, 70)) for w in (0, 40)),
    *((Case(fmt, (60,), soft_cap=2.0, page_tokens=48), (70,)) for fmt in (K4V2, RAW)),
    *((Case(K4V2, (17, 5, 400), sink_tokens=s, window_left=w), (130, 20, 70)) for s in (1, 4) for w in (None, 40, 410)),
    (Case(K4V2, (1025,), heads=1, group=2), (3,)),
    (Case(K4V2, (300, 20), heads=3, group=1), (0, 97)),
    *((Case(K4V3, (40, 300, 0), coarse=K3V2, page_tokens=p, group=g), (18, 70, 5)) for p, g in ((16, 3), (64, 9))),
    (Case(K4V3, (17, 700), coarse=Format(2, 2), page_tokens=32, window_left=100, sink_tokens=1), (40, 20)),
    (Case(K4V2, MIXED), tuple(1 + 7 * i % 5 for i in range(17))),
    *((Case(K4V2, (97, 16), dtype=dtype), (5, 70)) for dtype in (torch.float16, torch.bfloat16)),
]


def inputs(case: Case, new_tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = sum(new_tokens)
    query = gaussian(count, case.heads * case.group, case.head_dim, seed=99)
    key, value = (gaussian(count, case.heads, case.head_dim, seed=seed) for seed in (300, 301))
    return query.to(case.dtype), key.to(case.dtype), value.to(case.dtype)


@pytest.mark.parametrize(("case", "new_tokens"), CASES, ids=str)
def test_equals_the_float64_twins(case: Case, new_tokens: tuple[int, ...], isa: str) -> None:
    query, key, value = inputs(case, new_tokens)
    out, lse = run_extend(CPU, query, key, value, list(new_tokens), context_of(case), case.scoring)
    assert out.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(case.dtype).removeprefix("torch."), 0.0)
    near = float_budget(isa)

    # Against the twin that rounds the query alike for packed tokens: scores are exact.
    exact = case.fmt.is_raw or max(case.lengths) < 16
    want_out, want_lse = extend_float64(
        query.float(), key, value, new_tokens, case, None if exact else int8_query(query)
    )
    torch.testing.assert_close(lse.double(), want_lse, rtol=near, atol=near)
    if exact:
        torch.testing.assert_close(out.double(), want_out, rtol=rounding + near, atol=near)
        return
    assert relative_rms(out, want_out) <= budgets.BACKEND_ATTEND_INT8_WEIGHTS + rounding

    # Against the definition.
    want_out, want_lse = extend_float64(query.float(), key, value, new_tokens, case)
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT8_LSE
    assert relative_rms(out, want_out) <= budgets.BACKEND_ATTEND_INT8 + rounding


@pytest.mark.parametrize("fmt", [K4V2, RAW], ids=str)
def test_agrees_with_the_reference_operation(fmt: Format, isa: str) -> None:
    case, new_tokens = Case(fmt, (97, 0, 33), head_dim=128, group=4), (30, 70, 1)
    arguments = (*inputs(case, new_tokens), list(new_tokens), context_of(case), case.scoring)
    (out, lse), (want_out, want_lse) = run_extend(CPU, *arguments), run_extend(OPS, *arguments)
    assert relative_rms(out, want_out.double()) <= budgets.BACKEND_ATTEND_INT8
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT8_LSE


@pytest.mark.parametrize(
    ("case", "new_tokens"),
    [
        (Case(K4V2, (0,), heads=1, group=1), (400,)),
        (Case(K4V2, (2000,), heads=1, group=2), (3,)),
        (Case(RAW, (500, 20), heads=3, group=1), (1, 60)),
        (Case(K4V2, (500, 1, 700), window_left=300), (70, 90, 1)),
    ],
    ids=str,
)
def test_threads_change_nothing_but_the_order_of_sums(case: Case, new_tokens: tuple[int, ...], isa: str) -> None:
    arguments = (*inputs(case, new_tokens), list(new_tokens), context_of(case), case.scoring)
    one = run_extend(CPU, *arguments)
    near = float_budget(isa)
    try:
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            many, again = run_extend(CPU, *arguments), run_extend(CPU, *arguments)
            assert torch.equal(many[0], again[0])
            assert torch.equal(many[1], again[1])
            torch.testing.assert_close(many[1], one[1], rtol=near, atol=near)
            assert relative_rms(many[0], one[0].double()) <= budgets.BACKEND_ATTEND_INT8_WEIGHTS
    finally:
        torch.set_num_threads(1)


def test_no_new_tokens_at_all(isa: str) -> None:
    case = Case(K4V2, (20, 5))
    query, key, value = inputs(case, (0, 0))
    out, lse = run_extend(CPU, query, key, value, [0, 0], context_of(case), case.scoring)
    assert (len(out), len(lse)) == (0, 0)


def test_refuses_a_page_that_is_not_there(isa: str) -> None:
    case = Case(K4V2, (97,))
    context = context_of(case)
    context.page_table[0, 1] = len(context.pages)
    query, key, value = inputs(case, (2,))
    try:
        with pytest.raises(ValueError, match=f"page {len(context.pages)} of"):
            run_extend(CPU, query, key, value, [2], context, case.scoring)
    finally:
        context_of.cache_clear()
