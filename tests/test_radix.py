"""The accounting identity: true for every honest division of pages, false for every dishonest one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_deltastore.radix import PageCensus, census
from sglang_deltastore.sharing import PageRecords

P = 16


def slots_of(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages, dtype=torch.int64)[:, None] * P + torch.arange(P)).flatten()


class Division:
    """12 pages and 3 frames, divided honestly; tests bend one thing."""

    def __init__(self) -> None:
        self.free_pages = torch.tensor([1, 2, 3, 4])
        self.node_slots = slots_of([5, 6, 7, 8, 9])
        # Request 2 reads the nodes' pages 5 and 6, and owns pages 10 and 11, the last one in part.
        self.running_slots = [slots_of([5, 6, 10, 11])[: 3 * P + 5], slots_of([12])]
        self.num_frames = 3
        self.free_frames = [1]
        self.running_frames = [2, 3]

    def count(self) -> PageCensus:
        return census(num_pages=12, page_tokens=P, records=PageRecords(12, P), **vars(self))


def test_honest_division() -> None:
    counted = Division().count()
    assert counted.errors == ()
    assert (counted.free, counted.in_nodes, counted.running) == (4, 5, 3)
    assert counted.free + counted.in_nodes + counted.running == counted.total == 12
    assert (counted.frames_free, counted.frames_running, counted.frames_total) == (1, 2, 3)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("free_pages", torch.tensor([1, 2, 3]), "1 pages lost (owned by nobody): [4]"),
        ("free_pages", torch.tensor([1, 2, 3, 4, 5]), "1 pages owned twice: [5]"),
        ("free_pages", torch.tensor([0, 1, 2, 3, 4]), "page 0 (padding) has an owner"),
        ("node_slots", slots_of([5, 6, 7, 8, 9])[:-1], "1 pages not wholly owned by one node path: [9]"),
        ("node_slots", slots_of([5, 6, 7, 8, 9, 9]), "1 pages not wholly owned by one node path: [9]"),
        ("running_slots", [slots_of([10, 11]), slots_of([11, 12])], "1 pages owned twice: [11]"),
        ("running_frames", [2], "frames: 1 free + 1 running are not the 3 there are"),
        ("running_frames", [2, 2], "frames: 1 free + 2 running are not the 3 there are"),
    ],
)
def test_dishonest_divisions_are_named(field: str, value: object, complaint: str) -> None:
    division = Division()
    setattr(division, field, value)
    assert complaint in division.count().errors


@settings(deadline=None)
@given(st.lists(st.sampled_from(["free", "node", "running"]), min_size=1, max_size=40))
def test_any_partition_is_honest(owners: list[str]) -> None:
    by_owner = {
        name: [i + 1 for i, owner in enumerate(owners) if owner == name] for name in ("free", "node", "running")
    }
    division = Division()
    division.free_pages = torch.tensor(by_owner["free"], dtype=torch.int64)
    division.node_slots = slots_of(by_owner["node"])
    division.running_slots = [slots_of([page]) for page in by_owner["running"]]
    counted = census(num_pages=len(owners), page_tokens=P, records=PageRecords(len(owners), P), **vars(division))
    assert counted == replace(
        counted,
        free=len(by_owner["free"]),
        in_nodes=len(by_owner["node"]),
        running=len(by_owner["running"]),
        errors=(),
    )
