"""Sinks that the table has lost come back from host memory as they were, or not at all."""

from __future__ import annotations

import torch

from deltastore_kernels import ops
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.store.host_sinks import HostSinks
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.sinks import NO_SINK
from sglang_deltastore.store.size import StoreSize

LAYOUTS = (PageLayout(Format(4, 3), 2, 64, 16), PageLayout(RAW, 2, 64, 16), PageLayout(Format(3, 2), 1, 32, 16))


def make_store(capacity: int) -> PageStore:
    store = PageStore(StoreSize(LAYOUTS, num_frames=2, context_tokens=64), 8, "cpu", ops.load("reference"))
    store.sink_table.second_level = HostSinks(store, capacity)
    return store


def sink_bytes(store: PageStore, sink: int) -> list[torch.Tensor]:
    return [tensor[sink].clone() for tensor in (*store.sink_key_rot, *store.sink_value_rot) if len(tensor)]


def write(store: PageStore, frame: int, beginning: int) -> list[torch.Tensor]:
    """A request in this frame begins so, and writes its sink; the sink's bytes."""
    table = store.sink_table
    table.hold({frame: beginning})
    sink = table.to_write(frame)
    assert sink
    for tensor in (*store.sink_key_rot, *store.sink_value_rot):
        if len(tensor):
            tensor[sink] = torch.randn(tensor[sink].shape, generator=torch.Generator().manual_seed(beginning))
    return sink_bytes(store, sink)


def test_a_lost_sink_comes_back_and_is_not_written_again() -> None:
    store = make_store(capacity=2)
    table = store.sink_table
    written = write(store, 1, beginning=7)
    table.release(1)
    assert table.free == table.total
    write(store, 1, beginning=8)  # takes the sink that 7 had
    table.hold({2: 7})
    back = table.of_frame(2)
    assert back != NO_SINK
    assert table.to_write(2) == 0
    assert all(torch.equal(a, b) for a, b in zip(sink_bytes(store, back), written, strict=True))


def test_what_the_host_has_lost_as_well_is_not_read_until_it_is_written() -> None:
    store = make_store(capacity=2)
    table = store.sink_table
    for beginning in (7, 8, 9):  # 7 was kept longest ago
        write(store, 1, beginning)
        table.release(1)
    table.hold({1: 7, 2: 8})
    assert table.of_frame(1) == NO_SINK
    assert table.of_frame(2) != NO_SINK
    assert table.to_write(1) > 0
    assert table.of_frame(1) != NO_SINK


def test_clearing_the_table_clears_the_host() -> None:
    store = make_store(capacity=2)
    write(store, 1, beginning=7)
    store.sink_table.release(1)
    store.sink_table.clear()
    store.sink_table.hold({1: 7})
    assert store.sink_table.of_frame(1) == NO_SINK


def test_a_sink_goes_to_a_storage_and_comes_to_another_process() -> None:
    store, other = make_store(capacity=2), make_store(capacity=2)
    here, there = store.sink_table.second_level, other.sink_table.second_level
    written = write(store, 1, beginning=7)
    assert here.read(7) is None
    store.sink_table.copy(7)
    there.put(7, here.read(7))
    other.sink_table.hold({2: 7})
    back = other.sink_table.of_frame(2)
    assert all(torch.equal(a, b) for a, b in zip(sink_bytes(other, back), written, strict=True))


def test_a_sink_that_is_here_stays_what_it_is() -> None:
    store = make_store(capacity=2)
    host = store.sink_table.second_level
    write(store, 1, beginning=7)
    store.sink_table.copy(7)
    before = host.read(7)
    host.put(7, torch.zeros_like(before))
    assert torch.equal(host.read(7), before)


def test_what_has_not_been_written_is_not_copied() -> None:
    store = make_store(capacity=2)
    store.sink_table.hold({1: 7})
    store.sink_table.copy(7)
    store.sink_table.copy(8)
    assert store.sink_table.second_level.read(7) is None
