"""The accounting identity: true for every honest division of pages, false for every dishonest one."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_deltastore.observe.census import Census, Counts, count_errors
from sglang_deltastore.observe.nodes import Node
from tests.observe.live_tree import LiveTree
from tests.observe.live_tree import P as TREE_PAGE

P = 16


def slots_of(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * P + torch.arange(P)).flatten()


def verdict(
    num_pages: int, free: list[int], nodes: list[torch.Tensor], budget_s: float = 1.0, may_lack: bool = False
) -> tuple[str, ...]:
    """Of a census over nodes with these slots; one of them may hold more or less than it says."""
    stand_ins = [Node(at + 1, None, 0, len(slots) // P * P) for at, slots in enumerate(nodes)]
    free_pages = torch.tensor(free, dtype=torch.int64)
    census = Census(num_pages, P, free_pages, stand_ins, lambda node: nodes[node.id - 1], may_lack)
    for _ in range(1000):
        if (errors := census.go_on(budget_s)) is not None:
            return errors
    raise AssertionError("it never ends")


@pytest.mark.parametrize("budget_s", [0.0, 1.0])
@pytest.mark.parametrize(
    ("free", "nodes", "complaints"),
    [
        ([1, 2, 3, 4], [[5, 6], [7]], ()),
        ([1, 2, 3], [[5, 6], [7]], ("1 pages lost (owned by nobody): [4]",)),
        ([1, 2, 3, 4, 5], [[5, 6], [7]], ("1 pages owned twice: [5]",)),
        ([1, 2, 3, 4], [[5, 6], [6, 7]], ("1 pages owned twice: [6]",)),
        ([1, 2, 3, 4], [[5, 6, 7, 7, 7, 7]], ("1 pages owned twice: [7]",)),
        ([0, 1, 2, 3, 4], [[5, 6], [7]], ("a page that there is not (or page 0, padding) has an owner",)),
        ([1, 2, 3, 4], [[5, 6], [7, 99]], ("a page that there is not (or page 0, padding) has an owner",)),
        ([], [], ("7 pages lost (owned by nobody): [1, 2, 3, 4, 5, 6, 7]",)),
    ],
)
def test_dishonest_divisions_are_named(
    free: list[int], nodes: list[list[int]], complaints: tuple[str, ...], budget_s: float
) -> None:
    assert verdict(7, free, [slots_of(pages) for pages in nodes], budget_s) == complaints


def test_pages_in_part_and_nodes_that_hold_something_else() -> None:
    slots = slots_of([5, 6, 7])
    swapped = slots.clone()
    swapped[[18, 19]] = slots[[19, 18]]
    assert verdict(7, [1, 2, 3, 4], [swapped]) == ("1 pages not wholly owned by one node: [6]",)
    short = verdict(7, [1, 2, 3, 4, 5, 6, 7], [slots[:-1]])
    assert short == ("node 1 holds 47 slots for 32 tokens",)


@pytest.mark.parametrize(
    ("free", "nodes", "complaints"),
    [
        ([1, 2, 3, 4], [[0, 5, 0, 6], [7], [0]], ()),
        ([1, 2, 3, 4], [[0, 5, 0, 0], [7], [0]], ("1 pages lost (owned by nobody): [6]",)),
        ([1, 2, 3, 4, 5], [[0, 5, 0, 6], [7]], ("1 pages owned twice: [5]",)),
    ],
)
def test_nodes_may_lack_pages_behind_windows(
    free: list[int], nodes: list[list[int]], complaints: tuple[str, ...]
) -> None:
    slots = [slots_of(pages) for pages in nodes]
    for part in slots:
        part[part < P] = 0  # as SGLang's map says of a freed page's tokens
    assert verdict(7, free, slots, may_lack=True) == complaints
    half = slots[0].clone()
    half[P + 1] = 0
    assert "1 pages not wholly owned by one node" in verdict(7, free, [half, *slots[1:]], may_lack=True)[-1]
    assert "a page that there is not (or page 0, padding) has an owner" in verdict(7, free, slots)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["free", "node"]), min_size=1, max_size=40))
def test_any_partition_is_honest(owners: list[str]) -> None:
    free, stored = ([at + 1 for at, owner in enumerate(owners) if owner == name] for name in ("free", "node"))
    assert verdict(len(owners), free, [slots_of([page]) for page in stored]) == ()


def test_a_slice_is_short_however_many_pages_there_are() -> None:
    """200,000 pages in 2,000 nodes: begun again and again, never for long."""
    nodes, per_node = 2000, 100
    stand_ins = [Node(at + 1, None, 0, per_node * P) for at in range(nodes)]
    slots = slots_of(list(range(1, nodes * per_node + 1))).view(nodes, -1)
    census = Census(nodes * per_node, P, torch.empty(0, dtype=torch.int64), stand_ins, lambda node: slots[node.id - 1])
    slices, errors = [], None
    while errors is None:
        started = time.thread_time()  # of a machine that has other work, this thread's part
        errors = census.go_on(0.002)
        slices.append(time.thread_time() - started)
    assert errors == ()
    assert len(slices) > 5
    assert sorted(slices)[len(slices) // 2] < 0.006, "2 ms, and as much again for what is under way"


COUNTS = Counts(12, 4, 5, 3, 3, 1, 2)
WINDOWS = replace(COUNTS, window_pages_total=6, window_pages_free=1, window_pages_in_nodes=3, window_pages_running=2)


@pytest.mark.parametrize(
    ("counts", "frames", "complaint"),
    [
        (COUNTS, ([1], [2, 3]), None),
        (replace(COUNTS, pages_free=3), ([1], [2, 3]), "pages: 3 free + 5 in nodes + 3 of running requests are not"),
        (WINDOWS, ([1], [2, 3]), None),
        (
            replace(WINDOWS, window_pages_running=1), ([1], [2, 3]),
            "window_pages: 1 free + 3 in nodes + 1 of running requests are not the 6",
        ),
        (COUNTS, ([1], [2]), "frames: 1 free + 1 running are not the 3 there are"),
        (COUNTS, ([1], [2, 2]), "frames: 1 free + 2 running are not the 3 there are"),
    ],
)  # fmt: skip
def test_counts(counts: Counts, frames: tuple[list[int], list[int]], complaint: str | None) -> None:
    errors = count_errors(counts, *frames)
    assert (complaint in errors[0] and len(errors) == 1) if complaint else errors == ()


def test_the_real_tree_and_a_page_that_is_lost_in_it() -> None:
    live = LiveTree(32)
    for branch in range(3):
        request = live.begin([1, 2, 3, 4, 5, 6, 7, 8, branch, 9, 9, 9])
        live.finish(request, [1, 2, 3, 4, 5])
    live.match([1, 2, 3, 4, 99, 99, 99, 99])  # splits a node, of which nobody tells

    def errors() -> tuple[str, ...] | None:
        census = Census(32, TREE_PAGE, live.allocator.get_all_free_pages(), live.tree.mirror.order, live.tree.slots_of)
        assert census.go_on(1.0) is None
        return census.go_on(1.0)

    assert errors() == ()
    lost = int(live.allocator.free_pages[0])
    live.allocator.free_pages = live.allocator.free_pages[1:]
    assert errors() == (f"1 pages lost (owned by nobody): [{lost}]",)


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_host = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        blocking = func is torch.ops.aten.copy_.default and not (args[2:] and args[2])
        if to_host or blocking or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


def test_on_a_gpu_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are counted there; the verdict is read once its copy has arrived, and not before."""
    arrived, recorded = [False], []
    event = SimpleNamespace(record=lambda: recorded.append(True), query=lambda: arrived[0])
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    with FakeTensorMode(), NoWaiting():
        slots = torch.arange(5 * P, 8 * P, device="cuda")
        census = Census(7, P, torch.arange(1, 5, device="cuda"), [Node(1, None, 0, 3 * P)], lambda _node: slots)
        assert census.go_on(1.0) is None
        assert recorded == [True]
        for _ in range(3):
            assert census.go_on(1.0) is None
        with pytest.raises(AssertionError, match="waits for the device"):
            slots.cpu()
    census._report.tensor = torch.tensor([0, 1, 1, 1, 0, 1, 1, 2], dtype=torch.uint8)  # as it arrives
    assert census.go_on(1.0) is None
    arrived[0] = True
    assert census.go_on(1.0) == ("1 pages lost (owned by nobody): [4]", "1 pages owned twice: [7]")
