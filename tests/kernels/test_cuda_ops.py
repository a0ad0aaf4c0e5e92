"""The CUDA operations' Python, with stand-ins for compiled modules (cuda/modules.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from deltastore_kernels import cuda_build, ops
from deltastore_kernels.layout import RAW, Format
from deltastore_kernels.ops import _flashinfer as plans
from deltastore_kernels.ops._cuda import StepIndices
from deltastore_kernels.ops.attend_decode import cuda as decode_step
from deltastore_kernels.ops.attend_extend import cuda as extend
from deltastore_kernels.ops.decode.cuda import decode, decode_stored
from tests import budgets
from tests.kernels.attention_case import OPS, Case, gaussian
from tests.kernels.cpu_case import context_of, decoded_of, query_of, request_rms
from tests.kernels.cuda.fiber_case import FORMATS, leave
from tests.kernels.cuda.modules import FiberModule, FlashInfer
from tests.kernels.paged_context import run_decode, run_extend

K4V2, K3V2 = Format(4, 2), Format(3, 2)


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[cuda_build.Kernels, FiberModule]:
    """Modules on fibers instead of a GPU's, FlashInfer in torch, and an eight-core GPU."""
    loaded: dict[cuda_build.Kernels, FiberModule] = {}
    monkeypatch.setattr(cuda_build, "load", lambda kernels: loaded.setdefault(kernels, FiberModule(kernels)))
    monkeypatch.setattr(decode_step, "leave", leave)
    monkeypatch.setattr(decode_step, "_multiprocessors", lambda device: 8)
    for module in (extend, plans):
        monkeypatch.setattr(module, "flashinfer", FlashInfer)
    plans.workspaces.cache_clear()
    yield loaded
    plans.workspaces.cache_clear()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("head_dim", cuda_build.HEAD_DIMS)
def test_decode_gives_the_twins_numbers(fmt: Format, head_dim: int) -> None:
    context = context_of(Case(fmt, (64, 32), heads=2, head_dim=head_dim, page_tokens=32))
    page_ids = torch.cat((context.page_table[0, :2], context.page_table[1, :1]))
    for got, want in zip(decode(context.pages, page_ids, context.layout), OPS.decode(
        context.pages, page_ids, context.layout), strict=True):  # fmt: skip
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=budgets.BACKEND_DECODE, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [K3V2, RAW], ids=str)
def test_any_stored_token_is_decoded_from_where_it_is(fmt: Format, dtype: torch.dtype) -> None:
    case = Case(fmt, (97, 40, 5), page_tokens=48, sink_tokens=4)
    requests = torch.tensor([0, 0, 0, 0, 1, 1, 2, 0, 1, 2], dtype=torch.int32)
    positions = torch.tensor([0, 3, 4, 96, 0, 39, 4, 50, 15, 0], dtype=torch.int32)
    context = context_of(case)
    got = decode_stored(requests, positions, StepIndices(context.step), context.layer, dtype)
    for side in range(2):
        rows = zip(requests.tolist(), positions.tolist(), strict=True)
        want = torch.stack([torch.from_numpy(decoded_of(case)[r][side][:, p]) for r, p in rows])
        near = budgets.BACKEND_DECODE + torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got[side].double(), want, rtol=near, atol=1e-7)  # float16's smallest steps


@pytest.mark.parametrize("case", [
    Case(K4V2, (97, 700, 5), group=4, sink_tokens=1),
    Case(K4V2, (97, 300), group=4, window_left=100, soft_cap=30.0, dtype=torch.bfloat16),
    Case(RAW, (97, 40), group=9, head_dim=128),
], ids=str)  # fmt: skip
def test_attend_decode_passes_everything_on(case: Case) -> None:
    query, context = query_of(case), context_of(case)
    out, lse = run_decode(decode_step, query, context, case.scoring)
    want_out, want_lse = run_decode(OPS, query, context, case.scoring)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    rounding = budgets.BACKEND_ATTEND_ROUNDED.get(str(case.dtype).removeprefix("torch."), 0.0)
    assert float(request_rms(out, want_out.double()).max()) <= budgets.BACKEND_ATTEND_INT16 + rounding
    assert float((lse - want_lse).abs().max()) <= budgets.BACKEND_ATTEND_INT16_LSE


def test_long_contexts_are_split(modules: dict[cuda_build.Kernels, FiberModule]) -> None:
    case = Case(K4V2, (1500,), heads=1, group=4)
    query, context = query_of(case), context_of(case)
    out, _ = run_decode(decode_step, query, context, case.scoring)
    assert modules[cuda_build.Kernels(K4V2, 64)].splits == [3]  # the table's 26 pages of 64 tokens hold three
    want, _ = run_decode(OPS, query, context, case.scoring)
    assert float(request_rms(out, want.double()).max()) <= budgets.BACKEND_ATTEND_INT16


@pytest.mark.parametrize(
    ("blocks", "table_tokens", "splits"),
    [(1, 131072, 256), (1, 512, 1), (1, 100, 1), (512, 8192, 1), (8, 8192, 16), (100, 131072, 4), (0, 8192, 16)],
)
def test_splits_fill_the_gpu_and_no_more(blocks: int, table_tokens: int, splits: int) -> None:
    assert decode_step.count_splits(blocks, table_tokens, multiprocessors=132) == splits


def test_head_dim_32_is_another_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(K4V2, (97,), head_dim=32)
    with pytest.raises(cuda_build.CudaUnavailable, match="head_dim=32"):
        cuda_build.Kernels(case.fmt, 32)
    page_ids = context_of(case).page_table[0, :1]
    want = OPS.decode(context_of(case).pages, page_ids, context_of(case).layout)
    monkeypatch.setattr("deltastore_kernels.ops.decode.cuda.fallback", lambda folder, name: getattr(OPS, name))
    got = decode(context_of(case).pages, page_ids, context_of(case).layout)
    assert torch.equal(got[0], want[0])


EXTEND_CASES = [
    (Case(K4V2, (97, 40, 5), group=2, dtype=torch.bfloat16), (9, 3, 20)),
    (Case(K4V2, (97, 0, 40, 0, 16), dtype=torch.float16, sink_tokens=4), (9, 3, 1, 20, 2)),
    (Case(K3V2, (0, 0), dtype=torch.bfloat16), (9, 1)),
    (Case(RAW, (100, 33), head_dim=128, dtype=torch.bfloat16, soft_cap=2.0), (5, 40)),
    (Case(K4V2, (60,), dtype=torch.bfloat16, window_left=71), (12,)),  # hides nothing yet
]


@pytest.mark.parametrize("room_tokens", [7, 64, 16384])
@pytest.mark.parametrize(("case", "new_tokens"), EXTEND_CASES, ids=str)
def test_extend_merges_its_parts(case: Case, new_tokens: tuple[int, ...], room_tokens: int, monkeypatch) -> None:
    context, heads = context_of(case), case.heads
    monkeypatch.setattr(extend, "WORKSPACE_BYTES", room_tokens * heads * case.head_dim * 4)
    query = gaussian(sum(new_tokens), heads * case.group, case.head_dim, seed=99).to(case.dtype)
    new = [gaussian(sum(new_tokens), heads, case.head_dim, seed=seed).to(case.dtype) for seed in (300, 301)]
    out, lse = run_extend(extend, query, *new, list(new_tokens), context, case.scoring)
    want_out, want_lse = run_extend(OPS, query, *new, list(new_tokens), context, case.scoring)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    assert float(request_rms(out, want_out.double()).max()) <= budgets.EXTEND_DECODED_TO_16_BITS
    assert float((lse - want_lse).abs().max()) <= budgets.EXTEND_DECODED_TO_16_BITS_LSE
    planned = [wrapper.plans[-1] for wrapper in plans.workspaces(query.device).sets[0].made]
    decoded = [int(plan["kv_indptr"][-1]) for plan in planned if not plan["causal"]]
    assert bool(decoded) == any(case.lengths)
    assert all(tokens <= room_tokens for tokens in decoded)


@pytest.mark.parametrize("room_tokens", [1, 3, 10, 100])
def test_parts_cover_every_token_once(room_tokens: int) -> None:
    stored = [0, 7, 0, 0, 12, 3, 1, 0]
    seen = [[] for _ in stored]
    for first, spans in plans.parts(stored, room_tokens):
        assert 0 < sum(end - begin for begin, end in spans) <= room_tokens
        for i, (begin, end) in enumerate(spans):
            assert begin < end
            seen[first + i] += range(begin, end)
    assert seen == [list(range(tokens)) for tokens in stored]


@pytest.mark.parametrize(
    "change", [{"window_left": 20}, {"dtype": torch.float32}, {"head_dim": 32}], ids=lambda change: next(iter(change))
)
def test_what_flashinfer_cannot_express_is_anothers(change: dict, monkeypatch) -> None:
    case = replace(Case(K4V2, (40,), heads=1, group=1, dtype=torch.bfloat16), **change)
    asked = []

    def fallback(folder: str, name: str):
        return lambda *planned: SimpleNamespace(run=lambda *given: asked.append((folder, name, planned, given)))

    monkeypatch.setattr(extend, "fallback", fallback)
    query, new = query_of(case), gaussian(1, 1, case.head_dim, seed=1).to(case.dtype)
    step, layer = context_of(case).step, context_of(case).layer
    plan = extend.ExtendPlan(step, [1])
    for _ in range(2):
        plan.run(query, new, new, layer, case.scoring)
    assert asked == 2 * [("attend_extend", "ExtendPlan", (step, [1]), (query, new, new, layer, case.scoring))]
    assert asked[0][2] is asked[1][2], "planned once for both layers"


def test_more_sink_tokens_than_a_tile_are_refused() -> None:
    case = Case(K4V2, (40,))
    sinks = context_of(replace(case, sink_tokens=17)).sinks
    with pytest.raises(ValueError, match="17 sink tokens"):
        run_decode(decode_step, query_of(case), replace(context_of(case), sinks=sinks), case.scoring)


def test_the_backend_takes_cuda_first() -> None:
    loaded = ops.load("flashinfer", device="cuda")
    assert loaded.plan_decode is decode_step.DecodePlan
    assert loaded.plan_extend is extend.ExtendPlan
    assert loaded.decode is decode
