"""Learned sinks: one more column of the softmax, that has no value."""

from __future__ import annotations

import pytest
import torch

from deltastore_kernels import ops
from deltastore_kernels.layout import Format
from deltastore_kernels.sink_logits import apply_sink_logits
from tests import budgets
from tests.kernels.attention_case import Case, attend_naive, gaussian, store, stored
from tests.kernels.paged_context import run_decode

LOGITS = torch.linspace(-4, 8, 6)


@pytest.mark.parametrize("logits", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_sink_is_a_column_of_the_softmax(dtype: str, logits: str) -> None:
    sink_logits = LOGITS.to(getattr(torch, logits))
    scores, values = gaussian(5, 6, 40, seed=1) * 3, gaussian(40, 32, seed=2).mul(0.4)
    column = sink_logits.double()[None, :, None].expand(5, -1, 1)
    expected = torch.cat((scores.double(), column), -1).softmax(-1)[..., :-1] @ values.double()
    out = (scores.softmax(-1) @ values).to(getattr(torch, dtype))
    found = apply_sink_logits(out, scores.logsumexp(-1), sink_logits)
    assert found.dtype is out.dtype
    # Twice: out was rounded before.
    allowed = 2 * budgets.BACKEND_ATTEND_ROUNDED.get(dtype, budgets.BACKEND_ATTEND_FLOAT32)
    assert (found - expected).abs().max() < allowed


def test_a_row_that_saw_nothing_is_zero_whatever_attention_left_there() -> None:
    lse = torch.tensor([[-torch.inf, 1.0], [-torch.inf, -torch.inf]])
    out = torch.full((2, 2, 32), torch.nan)
    out[0, 1] = 1
    found = apply_sink_logits(out, lse, torch.zeros(2))
    assert (found[0, 0] == 0).all() and (found[1] == 0).all()
    torch.testing.assert_close(found[0, 1], torch.full((32,), torch.e / (1 + torch.e)))


@pytest.mark.parametrize("sink_logit", [-torch.inf, -1e30, 1e30, torch.inf])
def test_extreme_logits_give_all_or_nothing(sink_logit: float) -> None:
    out = gaussian(3, 2, 32, seed=1)
    found = apply_sink_logits(out, torch.full((3, 2), 50.0), torch.full((2,), sink_logit))
    assert torch.equal(found, out if sink_logit < 0 else torch.zeros_like(out))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window_left", [None, 20])
def test_a_step_s_logarithms_are_what_the_sinks_are_weighed_against(backend: str, window_left: int | None) -> None:
    """Over sinks, packed pages and frames. GPU backends' logarithms are compared with the twin's elsewhere."""
    case = Case(Format(4, 3), (5, 100, 333), window_left=window_left, sink_tokens=1)
    context = store(case, case.kv(seed=1), case.kv(seed=2))
    query = gaussian(len(case.lengths), case.heads * case.group, case.head_dim, seed=3)
    found = apply_sink_logits(*run_decode(ops.load(backend), query, context, case.scoring), LOGITS)
    for request, length in enumerate(case.lengths):
        out, lse = attend_naive(query[request : request + 1], *stored(context, request), length - 1, case.scoring)
        expected = (out * (lse - torch.logaddexp(lse, LOGITS.double())).exp()[..., None])[0]
        relative_rms = (found[request] - expected).norm() / expected.norm()
        # The compiled kernel's logarithm moves the sinks' share by a part of itself, too.
        allowed = budgets.BACKEND_ATTEND_FLOAT32 if backend == "reference" else 2 * budgets.BACKEND_ATTEND_INT8
        assert relative_rms < allowed
