"""A step's indices are looked at once, in full, by its plan, and not again by its layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltastore_kernels.layout import Format
from deltastore_kernels.ops import DecodePlan
from tests.kernels.attention_case import Case
from tests.kernels.cpu_case import CPU, context_of, fresh_memory_is_nan, query_of
from tests.kernels.paged_context import PagedContext, run_decode

assert fresh_memory_is_nan  # fixture

CASE = Case(Format(4, 2), (97, 98), sink_tokens=1)


def plan(context: PagedContext) -> DecodePlan:
    """With the layer's own sizes as bounds."""
    return CPU.plan_decode(context.step, context.layer)


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
        plan(changed(**change))


@pytest.mark.parametrize("name", ["page_table", "frame_ids", "frame_tokens"])
def test_refuses_tables_of_other_lengths(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*one for each request"):
        plan(changed(**{name: getattr(context_of(CASE), name)[:1]}))


def test_a_sound_context_passes_and_is_attended_to_alike() -> None:
    want = run_decode(CPU, query_of(CASE), context_of(CASE), CASE.scoring)
    got = plan(context_of(CASE)).run(query_of(CASE), context_of(CASE).layer, CASE.scoring)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_attention_does_not_look_again() -> None:
    """A sink that is out of reach, of a request without packed tokens: it is never read, only looked at."""
    context = context_of(CASE)
    sink_ids = context.sinks.ids.clone()
    made = plan(changed(packed_tokens=torch.tensor([96, 0]), frame_tokens=torch.tensor([1, 1]), sinks=replace(
        context.sinks, ids=sink_ids)))  # fmt: skip
    sink_ids[1] = 9
    unchecked = CPU.plan_decode(replace(context.step, sink_ids=sink_ids, packed_tokens=torch.tensor([96, 0])))
    with pytest.raises(ValueError, match="sink 9"):
        unchecked.run(query_of(CASE), context.layer, CASE.scoring)
    out, _ = made.run(query_of(CASE), context.layer, CASE.scoring)
    assert out.isfinite().all()


def test_no_window_hides_a_page_from_the_check() -> None:
    """One layer's window may hide what another layer reads."""
    case = replace(CASE, window_left=10, lengths=(400, 98))
    query, context = query_of(case), context_of(case)  # pages before the window are out of reach
    run_decode(CPU, query, context, case.scoring)
    with pytest.raises(ValueError, match="request 0: page"):
        plan(context)


def test_a_layer_smaller_than_what_was_checked_is_refused() -> None:
    context = context_of(CASE)
    made, few = plan(context), replace(context.layer, pages=context.pages[:-1])
    with pytest.raises(ValueError, match=rf"{len(few.pages)} pages .* checked against {len(context.pages)}"):
        made.run(query_of(CASE), few, CASE.scoring)
    frames = {name: getattr(context.layer, name)[:-1] for name in ("frame_key_rot", "frame_value_rot")}
    with pytest.raises(ValueError, match="frames"):
        made.run(query_of(CASE), replace(context.layer, **frames), CASE.scoring)
    none = {name: getattr(context.layer, name)[:0] for name in ("sink_key_rot", "sink_value_rot")}
    assert made.run(query_of(CASE), replace(context.layer, **none), CASE.scoring)[0].isfinite().all()


def test_more_queries_than_requests_are_refused() -> None:
    query = torch.cat((query_of(CASE), query_of(CASE)))
    with pytest.raises(ValueError, match="queries of 4 requests; the step has 2"):
        plan(context_of(CASE)).run(query, context_of(CASE).layer, CASE.scoring)


def test_rows_that_are_not_the_new_tokens_are_refused() -> None:
    context, rows = context_of(CASE), torch.zeros(3, CASE.heads, CASE.head_dim)
    made = CPU.plan_extend(context.step, [1, 1], context.layer)
    with pytest.raises(ValueError, match=r"key_rot: given are shape \(3, .*must be shape \(2, "):
        made.run(query_of(CASE), rows, rows[:2], context.layer, CASE.scoring)
