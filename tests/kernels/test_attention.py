"""attend_decode and attend_extend against a naive float64 oracle over the decoded values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltastore_kernels.layout import RAW, Format
from tests import budgets
from tests.kernels.attention_case import NO_PAGE, OPS, Case, attend_naive, gaussian, store, stored
from tests.kernels.paged_context import PagedContext, run_decode, run_extend

K4V3, K3V2, K2V4 = Format(4, 3), Format(3, 2), Format(2, 4)
MIXED = (1, 15, 16, 17, 97, 64, 2, 33, 128, 5, 48, 100, 31, 65, 16, 80, 79)  # batch 17

DECODE_CASES = [
    *(Case(fmt, (1, 15, 16, 17, 97)) for fmt in (K4V3, K3V2, K2V4, RAW)),
    *(Case(K4V3, (1, 97, 40), head_dim=head_dim) for head_dim in (32, 128, 256)),
    *(Case(RAW, (1, 97, 40), head_dim=head_dim) for head_dim in (32, 128, 256)),
    *(Case(K3V2, (97, 16), heads=heads, group=group) for heads, group in ((3, 1), (1, 3), (2, 4), (1, 8))),
    *(Case(K4V3, (100, 48, 7), page_tokens=page_tokens) for page_tokens in (16, 48, 64)),
    *(Case(fmt, (1, 17, 97, 160), window_left=w) for fmt in (K4V3, RAW) for w in (0, 5, 40, 1000)),
    *(Case(K4V3, (1, 100, 96, 130), window_left=w, page_tokens=16) for w in (0, 15, 16, 17, 40)),
    Case(K4V3, (97, 30), soft_cap=2.0),
    Case(RAW, (97, 30), soft_cap=30.0, window_left=40, page_tokens=48),
    Case(K4V3, (1025,), heads=1, group=2),
    Case(RAW, (1025,), heads=1, group=2, window_left=1000, page_tokens=48),
    *(Case(K4V3, (5, 17, 97, 160), sink_tokens=s, window_left=w) for s in (1, 4) for w in (None, 0, 95, 96, 1000)),
    Case(K4V3, MIXED, sink_tokens=1, page_tokens=16),
    Case(K4V3, MIXED),
    Case(K3V2, MIXED, head_dim=128, heads=1, group=2, window_left=40, page_tokens=16),
    *(Case(K4V3, MIXED, coarse=K3V2, page_tokens=16, window_left=w, sink_tokens=1) for w in (None, 40)),
    Case(K4V3, (97, 16), dtype=torch.float16),
    Case(K4V3, (97, 16), dtype=torch.bfloat16),
]
# Stored tokens, and how many new ones each request brings.
EXTEND_CASES = [
    *((Case(fmt, (0, 15, 16, 97)), (9, 3, 20, 1)) for fmt in (K4V3, K3V2, RAW)),
    *((Case(K4V3, (20, 0), head_dim=head_dim, page_tokens=16), (17, 5)) for head_dim in (32, 128, 256)),
    *((Case(K3V2, (40,), heads=heads, group=group), (18,)) for heads, group in ((3, 1), (1, 3), (2, 4), (1, 8))),
    *((Case(fmt, (0, 17, 100), window_left=w), (30, 20, 50)) for fmt in (K4V3, RAW) for w in (0, 5, 40, 1000)),
    *((Case(K4V3, (96, 110), window_left=w, page_tokens=16), (1, 7)) for w in (0, 15, 16, 17)),
    *((Case(K4V3, (17, 0, 100), sink_tokens=s, window_left=w), (30, 20, 50)) for s in (1, 4) for w in (None, 40, 105)),
    (Case(K4V3, (60,), soft_cap=2.0, page_tokens=48), (12,)),
    (Case(K4V3, (1025,), heads=1, group=2), (3,)),
    (Case(K4V3, (17,), heads=1, group=2), (130,)),  # more queries than one block scores at once
    (Case(RAW, (100,), heads=1, group=2, window_left=40), (130,)),
    (Case(K4V3, MIXED), tuple(1 + 7 * i % 5 for i in range(17))),
    (Case(K4V3, (17, 0, 300), coarse=Format(2, 2), page_tokens=32, sink_tokens=1), (30, 20, 50)),
    (Case(K4V3, (97, 16), dtype=torch.float16), (5, 2)),
    (Case(K4V3, (97, 16), dtype=torch.bfloat16), (5, 2)),
]


def queries(case: Case, tokens: int) -> torch.Tensor:
    return gaussian(tokens, case.heads * case.group, case.head_dim, seed=99).to(case.dtype)


def agree(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], case: Case) -> None:
    """Outputs and LSE within the budget of the case's dtype."""
    assert got[0].dtype == case.dtype
    assert got[1].dtype == torch.float32
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(case.dtype).removeprefix("torch."), 0.0)
    near = budgets.BACKEND_ATTEND_FLOAT32
    torch.testing.assert_close(got[0].double(), want[0], rtol=rounding + near, atol=near)
    torch.testing.assert_close(got[1].double(), want[1], rtol=near, atol=near)


def unreadable_before_the_window(context: PagedContext, first_query: list[int], case: Case) -> PagedContext:
    """The same context; pages wholly before a request's first window are neither owned nor whole."""
    coarse = context.coarse and replace(context.coarse, pages=context.coarse.pages.clone())
    hidden = replace(context, page_table=context.page_table.clone(), pages=context.pages.clone(), coarse=coarse)
    for i, position in enumerate(first_query):
        hidden_tokens = 0 if case.window_left is None else max(0, position - case.window_left)
        owned_pages = -(-int(context.packed_tokens[i]) // case.page_tokens)
        hidden_pages = min(hidden_tokens // case.page_tokens, owned_pages)
        hidden.spoil(hidden.page_table[i, :hidden_pages])
        hidden.page_table[i, :hidden_pages] = NO_PAGE
    return hidden


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode_equals_the_definition(case: Case) -> None:
    context = store(case, case.kv(seed=100), case.kv(seed=200))
    query = queries(case, len(case.lengths))
    rows = [
        attend_naive(query[i : i + 1], *stored(context, i), length - 1, case.scoring)
        for i, length in enumerate(case.lengths)
    ]
    want = torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
    poisoned = unreadable_before_the_window(context, [length - 1 for length in case.lengths], case)
    agree(run_decode(OPS, query, poisoned, case.scoring), want, case)


@pytest.mark.parametrize(("case", "new_tokens"), EXTEND_CASES, ids=str)
def test_extend_equals_the_definition(case: Case, new_tokens: tuple[int, ...]) -> None:
    context = store(case, case.kv(seed=100), case.kv(seed=200))
    query = queries(case, sum(new_tokens))
    key = gaussian(sum(new_tokens), case.heads, case.head_dim, seed=300).to(case.dtype)
    value = gaussian(sum(new_tokens), case.heads, case.head_dim, seed=301).to(case.dtype)
    rows, begin = [], 0
    for i, count in enumerate(new_tokens):
        new = slice(begin, begin + count)
        sides = [
            torch.cat((torch.from_numpy(old), fresh[new].transpose(0, 1).double()), dim=1).numpy()
            for old, fresh in zip(stored(context, i), (key, value), strict=True)
        ]
        rows.append(attend_naive(query[new], *sides, case.lengths[i], case.scoring))
        begin += count
    want = torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
    poisoned = unreadable_before_the_window(context, list(case.lengths), case)
    agree(run_extend(OPS, query, key, value, list(new_tokens), poisoned, case.scoring), want, case)


@pytest.mark.parametrize("window_left", [None, 0, 20])
@pytest.mark.parametrize(("old", "new"), [(0, 40), (15, 20), (37, 45)])
def test_extend_equals_decoding_token_by_token(old: int, new: int, window_left: int | None) -> None:
    """With raw pages nothing is lost, so the two ways to the same tokens must meet."""
    case = Case(RAW, (old + new,), page_tokens=16, window_left=window_left)
    (keys,), (values,), query = case.kv(seed=1), case.kv(seed=2), queries(case, new)
    before = store(case, [keys[:, :old]], [values[:, :old]])
    sides = (side[:, old:].transpose(0, 1) for side in (keys, values))
    at_once = run_extend(OPS, query, *sides, [new], before, case.scoring)
    for i in range(new):
        upto = old + i + 1
        context = store(case, [keys[:, :upto]], [values[:, :upto]])
        step = run_decode(OPS, query[i : i + 1], context, case.scoring)
        for together, single in zip(at_once, step, strict=True):
            near = budgets.BACKEND_EXTEND_VS_DECODE
            torch.testing.assert_close(together[i : i + 1], single, rtol=near, atol=near)


def test_one_visible_token_gives_its_value() -> None:
    """The softmax over one key is 1: the answer is exact."""
    for case in (Case(K4V3, (1, 16)), Case(RAW, (17, 40), window_left=0), Case(K4V3, (48,), window_left=0)):
        context = store(case, case.kv(seed=1), case.kv(seed=2))
        length = case.lengths[0]
        out, _ = run_decode(OPS, queries(case, len(case.lengths)), context, case.scoring)
        value = torch.from_numpy(stored(context, 0)[1][:, length - 1]).float()
        assert torch.equal(out[0], value.repeat_interleave(case.group, dim=0))


def test_empty_batches_and_requests_without_new_tokens() -> None:
    case = Case(K4V3, (20, 5))
    context = store(case, case.kv(seed=1), case.kv(seed=2))
    out, lse = run_decode(OPS, queries(case, 0), context, case.scoring)
    assert (len(out), len(lse)) == (0, 0)
    query, key = queries(case, 3), gaussian(3, case.heads, case.head_dim, seed=3)
    out, lse = run_extend(OPS, query, key, key, [0, 3], context, case.scoring)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize(("fmt", "budget"), budgets.ATTENTION_RMS.items(), ids=str)
def test_attention_over_packed_pages_stays_near_unquantized(fmt: tuple[int, int], budget: float) -> None:
    packed, raw = Case(Format(*fmt), (1024,) * 2), Case(RAW, (1024,) * 2)
    keys, values = ([gaussian(2, 1024, 64, seed=s + i).half() for i in range(2)] for s in (10, 20))
    query = queries(packed, 2)
    got, _ = run_decode(OPS, query, store(packed, keys, values), packed.scoring)
    want, _ = run_decode(OPS, query, store(raw, keys, values), raw.scoring)
    assert float(((got - want).square().sum() / want.square().sum()).sqrt()) <= budget
