"""Each step's indices are checked once, before any kernel reads by them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from deltastore_kernels import native, ops
from deltastore_kernels.context import LayerStore, Scoring
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.store import steps
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

HEADS, PAGE_TOKENS, LAYERS = 2, 16, (RAW, Format(4, 2), Format(4, 3))
SCORING = Scoring(0.125, window_left=8)


class Counted:
    """The compiled operations; remembers against what each step's plan checked, and how many layers ran."""

    def __init__(self) -> None:
        self.bounds: list[LayerStore] = []
        self.runs = 0
        real = ops.load("cpu")

        def planned(plan):
            def make(*step_and_more):
                self.bounds.append(step_and_more[-1])
                made = plan(*step_and_more)
                return SimpleNamespace(run=partial(self._run, made.run))

            return make

        self.ops = replace(real, plan_decode=planned(real.plan_decode), plan_extend=planned(real.plan_extend))

    def _run(self, run, *given):
        self.runs += 1
        return run(*given)


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


def run(store: PageStore, step: steps.ExtendStep | steps.DecodeStep, tokens: int, attend) -> None:
    for layer in range(len(LAYERS)):
        rows = torch.randn(3, tokens, HEADS, 64, generator=torch.Generator().manual_seed(layer))
        attend(store, layer, *rows, step, SCORING)


def test_one_check_a_step_for_all_layers(counted: Counted) -> None:
    store, rows = store_of(counted), torch.tensor([1, 2])
    step = steps.plan_extend(store, slots(), rows, [1, 2], torch.tensor([0, 0]), torch.tensor([40, 7]))
    run(store, step, 47, steps.extend)
    step = steps.plan_decode(store, slots(), rows, torch.tensor([41, 8]))
    run(store, step, 2, steps.decode)
    assert counted.runs == 2 * len(LAYERS)
    assert [bounds.sink_tokens for bounds in counted.bounds] == [1, 1], "the raw layer has no sinks to check against"


def test_a_page_that_is_not_there_is_refused_before_any_kernel_reads(counted: Counted) -> None:
    store, rows, table = store_of(counted), torch.tensor([1, 2]), slots()
    table[2, PAGE_TOKENS : 2 * PAGE_TOKENS] = 17 * PAGE_TOKENS  # behind the last page, hidden by the layers' window
    for plan in (
        lambda: steps.plan_decode(store, table, rows, torch.tensor([41, 40])),
        lambda: steps.plan_extend(store, table, rows, [1, 2], torch.tensor([0, 32]), torch.tensor([1, 1])),
    ):
        with pytest.raises(ValueError, match="request 1: page 17 of 17"):
            plan()
    assert counted.runs == 0
