"""The CUDA operations on a real GPU: what other tests here show on fibers and with stand-ins."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from deltastore_kernels.layout import RAW, Format
from deltastore_kernels.ops.attend_decode import cuda as attend_decode
from deltastore_kernels.ops.attend_extend import cuda as attend_extend
from deltastore_kernels.ops.decode.cuda import decode
from tests import budgets
from tests.kernels.attention_case import OPS, Case, gaussian
from tests.kernels.cpu_case import context_of, query_of, request_rms
from tests.kernels.paged_context import PagedContext, run_decode, run_extend
from tests.kernels.test_cuda_attend_decode import CASES, agree
from tests.kernels.test_cuda_ops import EXTEND_CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no NVIDIA GPU here: the CUDA kernels were run on fibers only"
    ),
]
K4V2 = Format(4, 2)


def on_gpu(value: object) -> object:
    """Tensors, and all that are in a dataclass, moved; indices as the kernels want them."""
    if isinstance(value, torch.Tensor):
        return value.to("cuda", torch.int32 if value.dtype == torch.int64 else value.dtype)
    if hasattr(value, "__dataclass_fields__") and any(
        isinstance(getattr(value, field.name), torch.Tensor) for field in fields(value)
    ):
        return replace(value, **{field.name: on_gpu(getattr(value, field.name)) for field in fields(value)})
    return value


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_decode_equals_the_float64_twin(case: Case) -> None:
    query = query_of(case)
    out, lse = run_decode(attend_decode, query.cuda(), on_gpu(context_of(case)), case.scoring)
    agree((out.cpu(), lse.cpu()), case, query)


def test_a_cuda_graph_follows_its_context() -> None:
    """Captured with one context, replayed with another in the same tensors."""
    case = Case(K4V2, (97, 600), group=4)
    query = query_of(case)
    context: PagedContext = on_gpu(context_of(case))
    packed = context.packed_tokens.clone()
    context.packed_tokens.fill_(16)
    static = query.cuda()
    run_decode(attend_decode, static, context, case.scoring)  # built and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run_decode(attend_decode, static, context, case.scoring)
    context.packed_tokens.copy_(packed)
    graph.replay()
    agree((out.cpu(), lse.cpu()), case, query)


@pytest.mark.parametrize("fmt", [K4V2, Format(3, 3), RAW], ids=str)
def test_decode_gives_the_twins_numbers(fmt: Format) -> None:
    context = context_of(Case(fmt, (128,), heads=2, head_dim=128))
    page_ids = context.page_table[0, :2]
    want = OPS.decode(context.pages, page_ids, context.layout)
    got = decode(context.pages.cuda(), page_ids.cuda(), context.layout)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=budgets.BACKEND_DECODE, atol=0)


@pytest.mark.parametrize(("case", "new_tokens"), EXTEND_CASES, ids=str)
def test_attend_extend_equals_the_twin(case: Case, new_tokens: tuple[int, ...]) -> None:
    context = context_of(case)
    query = gaussian(sum(new_tokens), case.heads * case.group, case.head_dim, seed=99).to(case.dtype)
    new = [gaussian(sum(new_tokens), case.heads, case.head_dim, seed=seed).to(case.dtype) for seed in (300, 301)]
    gpu = [tensor.cuda() for tensor in (query, *new)]
    out, lse = run_extend(attend_extend, *gpu, list(new_tokens), on_gpu(context), case.scoring)
    want_out, want_lse = run_extend(OPS, query, *new, list(new_tokens), context, case.scoring)
    assert float(request_rms(out.cpu(), want_out.double()).max()) <= budgets.EXTEND_DECODED_TO_16_BITS
    assert float((lse.cpu() - want_lse).abs().max()) <= budgets.EXTEND_DECODED_TO_16_BITS_LSE
