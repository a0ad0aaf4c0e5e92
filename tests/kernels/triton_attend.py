"""attend_decode and attend_extend in Triton against float64, over poisoned contexts. Started by test_triton.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from deltastore_kernels.context import SharedPrefix
from deltastore_kernels.layout import PACKED_BITS, RAW, Format
from deltastore_kernels.shared_prefix import find_shared_prefix
from tests import budgets
from tests.kernels.attention_case import Case, gaussian
from tests.kernels.cpu_case import attend_float64, context_of, extend_float64, query_of, request_rms
from tests.kernels.paged_context import run_decode, run_extend
from tests.kernels.triton_case import TRITON, asm, module, on_device  # noqa: F401  asm is a fixture

K4V3, K3V2, K2V4 = Format(4, 3), Format(3, 2), Format(2, 4)
LENGTHS = (1, 15, 16, 17, 97)

EVERY_FORMAT = [
    Case(fmt, LENGTHS, heads=1) for fmt in (*(Format(*bits) for bits in product(PACKED_BITS, repeat=2)), RAW)
]
DECODE_CASES = [
    *(Case(fmt, (1, 97), head_dim=head_dim, heads=1) for fmt in (K4V3, K3V2, K2V4) for head_dim in (32, 128, 256, 512)),
    *(Case(RAW, (1, 97), head_dim=head_dim, heads=1) for head_dim in (32, 256, 512)),
    *(Case(K3V2, (97, 16), heads=heads, group=group) for heads, group in ((3, 1), (1, 4), (1, 8), (1, 16))),
    *(Case(K4V3, (100, 48, 7), page_tokens=page_tokens) for page_tokens in (16, 48)),
    *(Case(K4V3, (1, 17, 97, 160), heads=1, window_left=w, page_tokens=16) for w in (0, 15, 16, 17, 40, 1000)),
    *(Case(RAW, (17, 97, 160), heads=1, window_left=w, page_tokens=48) for w in (5, 40)),
    Case(K4V3, (97, 30), soft_cap=2.0),
    Case(RAW, (97, 30), soft_cap=30.0, window_left=40, page_tokens=48),
    *(Case(K4V3, (5, 17, 97, 160), heads=1, sink_tokens=s, window_left=w) for s in (1, 4) for w in (None, 95, 96)),
    Case(K3V2, (5, 160, 97), sink_tokens=16, page_tokens=16),
    Case(K4V3, (97, 16), heads=1, dtype=torch.float16),
    Case(K4V3, (97, 16), heads=1, dtype=torch.bfloat16),
    Case(K4V3, (1025,), heads=1, group=2),
]
EXTEND_CASES = [
    *((Case(fmt, (0, 15, 16, 97), heads=1), (9, 3, 20, 1)) for fmt in (K4V3, K3V2, K2V4, RAW)),
    *((Case(K4V3, (20, 0), head_dim=head_dim, heads=1, page_tokens=16), (17, 5)) for head_dim in (32, 128, 256, 512)),
    (Case(RAW, (40,), head_dim=512, heads=1, group=2, window_left=20), (18,)),
    *((Case(K3V2, (40,), heads=heads, group=group), (18,)) for heads, group in ((2, 1), (1, 4), (1, 8))),
    *((Case(fmt, (0, 17, 100), heads=1, window_left=w), (30, 20, 50)) for fmt in (K4V3, RAW) for w in (0, 5, 40)),
    *((Case(K4V3, (96, 110), heads=1, window_left=w, page_tokens=16), (1, 7)) for w in (15, 16, 17)),
    *((Case(K4V3, (17, 0, 100), heads=1, sink_tokens=s, window_left=w), (3, 2, 5)) for s in (1, 4) for w in (None, 99)),
    (Case(K4V3, (60,), soft_cap=2.0, page_tokens=48), (12,)),
    (Case(K4V3, (17,), heads=1, group=2), (130,)),  # several blocks of rows, and of new tokens
    (Case(K4V3, (97, 16), heads=1, dtype=torch.float16), (5, 2)),
    (Case(K4V3, (97, 16), heads=1, dtype=torch.bfloat16), (5, 2)),
]


def agree(got, want, case: Case, rms: float, lse_error: float) -> None:
    """Outputs and LSE within their budgets, each request by itself; NaN is a failure."""
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(case.dtype).removeprefix("torch."), 0.0)
    assert got[0].dtype == case.dtype
    assert got[1].dtype == torch.float32
    out, lse = got[0].cpu(), got[1].cpu()
    assert out.isfinite().all()
    assert float(request_rms(out, want[0]).max()) <= rms + rounding
    assert float((lse.double() - want[1]).abs().max()) <= lse_error


def decode_budget(case: Case) -> tuple[float, float]:
    if case.fmt.is_raw:
        return budgets.BACKEND_ATTEND_HALVES, budgets.BACKEND_ATTEND_HALVES
    return budgets.BACKEND_ATTEND_INT15, budgets.BACKEND_ATTEND_INT15_LSE


@pytest.mark.parametrize("case", EVERY_FORMAT, ids=str)
def test_decode_of_every_format(case: Case, asm: bool) -> None:  # noqa: F811
    got = run_decode(TRITON, on_device(query_of(case)), on_device(context_of(case)), case.scoring)
    agree(got, attend_float64(query_of(case), case), case, *decode_budget(case))


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode(case: Case) -> None:
    got = run_decode(TRITON, on_device(query_of(case)), on_device(context_of(case)), case.scoring)
    agree(got, attend_float64(query_of(case), case), case, *decode_budget(case))


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
@pytest.mark.parametrize("window_left", [None, 100])
def test_decode_in_any_number_of_parts(parts: int, window_left: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(K3V2, (300, 20, 7), heads=1, window_left=window_left)
    monkeypatch.setattr(module("attend_decode"), "_parts", lambda *_: parts)
    got = run_decode(TRITON, on_device(query_of(case)), on_device(context_of(case)), case.scoring)
    agree(got, attend_float64(query_of(case), case), case, *decode_budget(case))


def test_decode_takes_indices_of_32_bits_and_no_requests() -> None:
    case = Case(K4V3, (97, 40), heads=1, sink_tokens=4)
    context = context_of(case)
    narrow = replace(
        context,
        page_table=context.page_table.int(),
        packed_tokens=context.packed_tokens.int(),
        frame_ids=context.frame_ids.int(),
        frame_tokens=context.frame_tokens.int(),
    )
    query = on_device(query_of(case))
    wide = run_decode(TRITON, query, on_device(context), case.scoring)
    for got, want in zip(run_decode(TRITON, query, on_device(narrow), case.scoring), wide, strict=True):
        assert torch.equal(got, want)
    assert [len(part) for part in run_decode(TRITON, query[:0], on_device(narrow), case.scoring)] == [0, 0]


def test_a_request_without_tokens_gives_zeros() -> None:
    """What a CUDA graph pads a batch with."""
    case = Case(K4V3, (40, 3))
    context = context_of(case)
    empty = replace(context, packed_tokens=torch.tensor([0, 0]), frame_tokens=torch.tensor([0, 3]))
    out, lse = run_decode(TRITON, on_device(query_of(case)), on_device(empty), case.scoring)
    assert not out[0].any()
    assert lse[0].isneginf().all()
    assert out[1].any()


def shared_case(case: Case, groups: tuple[int, ...], shared_pages: tuple[int, ...]):
    """The case's context, with requests of one group (by number) reading the first pages of the group's first."""
    context = context_of(case)
    table = context.page_table.clone()
    for i, group in enumerate(groups):
        leader = groups.index(group)
        table[i, : shared_pages[group]] = table[leader, : shared_pages[group]]
    sinks = context.sinks
    if sinks is not None:
        leaders = torch.tensor([groups.index(group) for group in groups])
        sinks = replace(sinks, ids=sinks.ids[leaders])
    return replace(context, page_table=table, sinks=sinks)


SHARED_CASES = [
    (Case(K4V3, (100, 97, 70, 130, 33), heads=1, page_tokens=16), (0, 0, 1, 0, 1), (4, 2)),
    (Case(K3V2, (60, 97, 70), heads=1, group=4, page_tokens=48), (0, 0, 0), (1,)),
    (Case(K2V4, (100, 97, 70, 64), heads=1, group=1, head_dim=128), (0, 1, 0, 1), (1, 1)),
    (Case(K4V3, (130, 97, 70, 130, 33), heads=1, sink_tokens=4, page_tokens=16), (0, 0, 1, 0, 1), (5, 2)),
    (Case(RAW, (100, 97, 40), heads=1, page_tokens=16), (0, 0, 1), (4, 0)),
    (Case(K4V3, (70, 65), head_dim=512, heads=1, page_tokens=16), (0, 0), (3,)),
    (Case(K4V3, (48, 50, 49) * 2, heads=1, group=8, page_tokens=16), (0,) * 6, (3,)),  # several chunks of rows
    (Case(K4V3, (100, 97, 180), heads=1, window_left=60, page_tokens=16), (0, 0, 0), (6,)),
    (Case(K4V3, (100, 97, 70), heads=1, soft_cap=2.0, page_tokens=16, dtype=torch.bfloat16), (0, 0, 0), (4,)),
]


@pytest.mark.parametrize(("case", "groups", "shared_pages"), SHARED_CASES, ids=str)
def test_sharing_a_prefix_changes_nothing(case: Case, groups: tuple[int, ...], shared_pages: tuple[int, ...]) -> None:
    context = on_device(replace(shared_case(case, groups, shared_pages), shared=None))
    query = on_device(query_of(case))
    apart = run_decode(TRITON, query, context, case.scoring)
    shared = find_shared_prefix(context.page_table, context.packed_tokens, case.page_tokens)
    assert shared.pages.any()
    together = run_decode(TRITON, query, replace(context, shared=shared), case.scoring)
    want = tuple(side.cpu().double() for side in apart)
    agree(together, want, case, *(2 * budget for budget in decode_budget(case)))


def test_a_shared_prefix_is_read_for_all_and_by_nobody_else() -> None:
    """Members' own entries for the shared pages are out of reach, and so is what they share for those alone."""
    case = Case(K4V3, (100, 97, 70), heads=1, page_tokens=16)
    context = shared_case(case, (0, 0, 1), (4, 0))
    table = context.page_table.clone()
    table[1, :4] = 2**31 - 1
    shared = SharedPrefix(torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([4, 4, 0], dtype=torch.int32))
    query = on_device(query_of(case))
    apart = run_decode(TRITON, query, on_device(context), case.scoring)
    hidden = on_device(replace(context, page_table=table, shared=shared))
    want = tuple(side.cpu().double() for side in apart)
    agree(run_decode(TRITON, query, hidden, case.scoring), want, case, *(2 * budget for budget in decode_budget(case)))


@pytest.mark.parametrize(("case", "new_tokens"), EXTEND_CASES, ids=str)
def test_extend(case: Case, new_tokens: tuple[int, ...]) -> None:
    query = gaussian(sum(new_tokens), case.heads * case.group, case.head_dim, seed=99).to(case.dtype)
    key, value = (gaussian(sum(new_tokens), case.heads, case.head_dim, seed=seed).to(case.dtype) for seed in (300, 301))
    # A query that is not stored yet sees one token less of the context than a decode query, which is stored.
    context = context_of(replace(case, window_left=None if case.window_left is None else case.window_left - 1))
    got = run_extend(TRITON, *map(on_device, (query, key, value)), list(new_tokens), on_device(context), case.scoring)
    want = extend_float64(query, key, value, new_tokens, case)
    begin = 0
    for count in new_tokens:
        rows = slice(begin, begin + count)
        agree(
            [side[rows] for side in got],
            [side[rows] for side in want],
            case,
            budgets.BACKEND_ATTEND_FLOAT16,
            budgets.BACKEND_ATTEND_FLOAT16_LSE,
        )
        begin += count


def test_extend_unpacks_alike_both_ways(asm: bool) -> None:  # noqa: F811
    case = Case(K3V2, (97, 16), heads=1)
    query, key = gaussian(7, 3, 64, seed=1), gaussian(7, 1, 64, seed=2)
    got = run_extend(TRITON, *map(on_device, (query, key, key)), [5, 2], on_device(context_of(case)), case.scoring)
    want = extend_float64(query, key, key, (5, 2), case)
    agree(got, want, case, budgets.BACKEND_ATTEND_FLOAT16, budgets.BACKEND_ATTEND_FLOAT16_LSE)


def test_extend_of_requests_without_new_tokens() -> None:
    case = Case(K4V3, (20, 5))
    query, key = gaussian(3, 6, 64, seed=1), gaussian(3, 2, 64, seed=2)
    context = on_device(context_of(case))
    out, lse = run_extend(TRITON, *map(on_device, (query, key, key)), [0, 3], context, case.scoring)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    none = on_device(query[:0]), on_device(key[:0]), on_device(key[:0])
    assert len(run_extend(TRITON, *none, [0, 0], context, case.scoring)[0]) == 0
