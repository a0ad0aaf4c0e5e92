"""Each step's indices are checked once, before any kernel reads by them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deltastore_kernels import native, ops
from deltastore_kernels.context import PagedContext, Scoring
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

HEADS, PAGE_TOKENS, LAYERS = 2, 16, (RAW, Format(4, 2), Format(4, 3))
SCORING = Scoring(0.125, window_left=8)


class Counted:
    """The compiled operations; remembers the contexts that were checked, and those that were attended to."""

    def __init__(self) -> None:
        self.checked: list[PagedContext] = []
        self.attended: list[PagedContext] = []
        real = ops.load("cpu")

        def check_context(context: PagedContext) -> None:
            self.checked.append(context)
            real.check_context(context)

        def attend_decode(query, context, scoring):
            self.attended.append(context)
            return real.attend_decode(query, context, scoring)

        def attend_extend(query, key, value, new_tokens, context, scoring):
            self.attended.append(context)
            return real.attend_extend(query, key, value, new_tokens, context, scoring)

        self.ops = SimpleNamespace(
            **vars(real)
            | {"check_context": check_context, "attend_decode": attend_decode, "attend_extend": attend_extend}
        )


@pytest.fixture
def counted() -> Counted:
    if not native.available():
        pytest.skip(f"compiled CPU kernels missing; {native.BUILD}")
    return Counted()


def store_of(counted: Counted) -> PageStore:
    layouts = tuple(PageLayout(fmt, HEADS, 64, PAGE_TOKENS) for fmt in LAYERS)
    return PageStore(StoreSize(layouts, 2, 256), 16, "cpu", counted.ops)


def slots() -> torch.Tensor:
    """Row 1 owns pages 1 .. 8, row 2 pages 9 .. 16."""
    table = torch.zeros(3, 128, dtype=torch.int32)
    table[1:] = torch.arange(PAGE_TOKENS, 17 * PAGE_TOKENS).view(2, 128)
    return table


def run(store: PageStore, step: steps.Step, tokens: int, attend) -> None:
    for layer in range(len(LAYERS)):
        rows = torch.randn(3, tokens, HEADS, 64, generator=torch.Generator().manual_seed(layer))
        attend(store, layer, *rows, step, SCORING)


def test_one_check_a_step_for_all_layers(counted: Counted) -> None:
    store, rows = store_of(counted), torch.tensor([1, 2])
    step = steps.plan_extend(store, slots(), rows, torch.tensor([0, 0]), torch.tensor([40, 7]))
    run(store, step, 47, steps.extend)
    steps.begin_decode(store, slots(), rows, torch.tensor([41, 8]))
    step = steps.plan_decode(store, slots(), rows, torch.tensor([41, 8]))
    run(store, step, 2, steps.decode)
    assert len(counted.checked) == 2
    assert all(context.sinks is not None and not context.checked for context in counted.checked)
    assert len(counted.attended) == 2 * len(LAYERS)
    assert all(context.checked for context in counted.attended)


def test_a_page_that_is_not_there_is_refused_before_any_kernel_reads(counted: Counted) -> None:
    store, rows, table = store_of(counted), torch.tensor([1, 2]), slots()
    table[2, PAGE_TOKENS : 2 * PAGE_TOKENS] = 17 * PAGE_TOKENS  # behind the last page, hidden by the layers' window
    for plan in (
        lambda: steps.plan_decode(store, table, rows, torch.tensor([41, 40])),
        lambda: steps.plan_extend(store, table, rows, torch.tensor([0, 32]), torch.tensor([1, 1])),
    ):
        with pytest.raises(ValueError, match="request 1: page 17 of 17"):
            plan()
    assert counted.attended == []
