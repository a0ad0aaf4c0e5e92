"""A step's context is looked at once, in full, and not again by attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltastore_kernels.context import PagedContext
from deltastore_kernels.layout import Format
from tests.kernels.attention_case import Case
from tests.kernels.cpu_case import CPU, context_of, fresh_memory_is_nan, query_of

assert fresh_memory_is_nan  # fixture

CASE = Case(Format(4, 2), (97, 98), sink_tokens=1)


def changed(**change: torch.Tensor) -> PagedContext:
    return replace(context_of(CASE), **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"page_table": torch.tensor([[0, 1, 0, 0], [0, 10**6, 0, 0]])}, "request 1: page 1000000"),
        ({"page_table": torch.tensor([[-1] * 4] * 2)}, "request 0: page -1"),
        ({"page_table": torch.zeros(2, 1, dtype=torch.int64)}, "ends after 1 pages"),
        ({"packed_tokens": torch.tensor([96, 17])}, "17 packed tokens"),
        ({"packed_tokens": torch.tensor([96, -16])}, "-16 packed tokens"),
        ({"frame_ids": torch.tensor([77, 0])}, "frame 77"),
        ({"frame_tokens": torch.tensor([16, 0])}, "16 in its frame"),
        ({"sinks": replace(context_of(CASE).sinks, ids=torch.tensor([2, 9]))}, "request 0: sink 2"),
    ],
)
def test_refuses_what_would_read_elsewhere(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CPU.check_context(changed(**change))


def test_a_sound_context_passes_and_is_attended_to_alike() -> None:
    CPU.check_context(context_of(CASE))
    want = CPU.attend_decode(query_of(CASE), context_of(CASE), CASE.scoring)
    got = CPU.attend_decode(query_of(CASE), changed(checked=True), CASE.scoring)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_attention_does_not_look_again() -> None:
    """A sink that is out of reach, of a request without packed tokens: it is never read, only looked at."""
    context = changed(
        packed_tokens=torch.tensor([96, 0]),
        frame_tokens=torch.tensor([1, 1]),
        sinks=replace(context_of(CASE).sinks, ids=torch.tensor([0, 9])),
    )
    with pytest.raises(ValueError, match="sink 9"):
        CPU.attend_decode(query_of(CASE), context, CASE.scoring)
    out, _ = CPU.attend_decode(query_of(CASE), replace(context, checked=True), CASE.scoring)
    assert out.isfinite().all()


def test_no_window_hides_a_page_from_the_check() -> None:
    """One layer's window may hide what another layer reads."""
    case = replace(CASE, window_left=10, lengths=(400, 98))
    query, context = query_of(case), context_of(case)  # pages before the window are out of reach
    CPU.attend_decode(query, context, case.scoring)
    with pytest.raises(ValueError, match="request 0: page"):
        CPU.check_context(context)
