"""The snapshot over stand-ins for SGLang's objects: bytes against the tensors themselves, states against sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deltastore_kernels import ops
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.config import Settings
from sglang_deltastore.pool import PageStore, StoreSize
from sglang_deltastore.reads import DecodeReads
from sglang_deltastore.seam import facts
from sglang_deltastore.seam.tree import DeltaRadixCache, TreeCounts
from sglang_deltastore.sharing import PageRecords
from sglang_deltastore.stats import StoreStats

P, PAGES, FRAMES = 32, 100, 3
#: 3 heads of 32 leave padding behind the anchors
LAYOUTS = tuple(PageLayout(Format(*bits), 3, 32, P) for bits in ((4, 3), (3, 2)))


class Tree(DeltaRadixCache):
    """Pages 5 -> 6 and 5 -> 7, as SGLang's core tells of them."""

    def __init__(self) -> None:  # not the real one's: there is no SGLang around it
        self.counts = TreeCounts(requests=2, prompt_tokens=130, hit_tokens=32, evictions=1, evicted_tokens=64)
        first, second, third = (slots_of_page(page) for page in (5, 6, 7))
        self.slots = torch.cat([first, second, third])
        self.tree_core = SimpleNamespace(
            walk_for_kv_canary=lambda **_: SimpleNamespace(
                slot_indices=self.slots,
                positions=torch.cat([torch.arange(2 * P), torch.arange(P, 2 * P)]),
                prev_slot_indices=torch.cat([torch.tensor([-1]), first, second[:-1], first[-1:], third[:-1]]),
            )
        )

    def all_values_flatten(self) -> torch.Tensor:
        return self.slots


def slots_of_page(page: int) -> torch.Tensor:
    return torch.arange(page * P, (page + 1) * P)


def scheduler(layouts: tuple[PageLayout, ...] = LAYOUTS, keep_tokens: bool = False) -> Any:
    """One request runs in row 2: page 5 of the tree, then 40 tokens of its own in pages 8 and 9."""
    store = PageStore(StoreSize(layouts, FRAMES, 256), PAGES, "cpu", ops.load())
    store.begin_step(4, torch.tensor([5, 6]), torch.tensor([5]))
    pool = SimpleNamespace(
        store=store, page_size=P, settings=Settings("deltastore", "k4v2"), calibration=None,
        sharing=PageRecords(PAGES, P, keep_tokens), decode_reads=DecodeReads(layouts, [None] * len(layouts)),
        get_kv_size_bytes=lambda: store.pages_bytes + store.frames_bytes + store.sinks_bytes,
    )  # fmt: skip
    rows = torch.zeros(FRAMES + 1, 256, dtype=torch.int32)
    rows[2, : P + 40] = torch.cat([slots_of_page(page) for page in (5, 8, 9)])[: P + 40]
    request = SimpleNamespace(kv=SimpleNamespace(holds_kv=True, req_pool_idx=2, kv_allocated_len=P + 40))
    free = torch.tensor([page for page in range(1, PAGES + 1) if page not in (5, 6, 7, 8, 9)])
    return SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool, get_all_free_pages=lambda: free),
        req_to_token_pool=SimpleNamespace(req_to_token=rows, size=FRAMES, free_slots=[1, 3]),
        tree_cache=Tree(), chunked_req=None,
        running_batch=SimpleNamespace(reqs=[request]), last_batch=None, is_fully_idle=lambda: False,
    )  # fmt: skip


def tensors(of: object) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, at any depth."""
    if isinstance(of, torch.Tensor):
        yield of
    elif isinstance(of, dict | list | tuple):
        for part in of.values() if isinstance(of, dict) else of:
            yield from tensors(part)
    elif type(of).__module__.startswith("sglang_deltastore"):
        yield from tensors(vars(of))


@pytest.mark.parametrize("layouts", [LAYOUTS, (PageLayout(RAW, 3, 32, P),)])
@pytest.mark.parametrize("keep_tokens", [False, True])
def test_bytes_are_those_of_the_tensors(layouts: tuple[PageLayout, ...], keep_tokens: bool) -> None:
    live = scheduler(layouts, keep_tokens)
    stats, pool = facts.LiveFacts(live).fresh(), live.token_to_kv_pool_allocator.get_kvcache()
    store = pool.store
    held = sum(tensor.nbytes for tensor in tensors([store, pool.sharing]))
    assert stats.resident_bytes == held
    parts = (stats.pages_bytes, stats.frames_bytes, stats.sinks_bytes, stats.maps_bytes)
    assert parts == tuple(
        sum(tensor.nbytes for tensor in tensors(group))
        for group in (
            store.pages,
            [store.frame_key_rot, store.frame_value_rot],
            [store.sink_key_rot, store.sink_value_rot],
            [store.sink_table, pool.sharing],
        )
    )
    fields = {
        name: sum(layout.field_offsets_bytes[name][1] * 3 * layout.tiles for layout in layouts) * (PAGES + 1)
        for name in ("key_codes", "value_codes", "scales", "anchors")
    }
    assert stats.codes_bytes == fields["key_codes"] + fields["value_codes"]
    assert stats.scales_bytes == fields["scales"] + fields["anchors"]
    assert stats.padding_bytes == stats.pages_bytes - sum(fields.values())
    # 5 pages, the frame of row 2, and the sink of page 5
    sinks = sum(side[0].nbytes for side in (*store.sink_key_rot, *store.sink_value_rot) if len(side))
    frames = sum(side[0].nbytes for side in (*store.frame_key_rot, *store.frame_value_rot))
    assert stats.used_bytes == 5 * sum(pages[0].nbytes for pages in store.pages) + frames + sinks


def test_states_tokens_and_counters() -> None:
    stats = facts.LiveFacts(scheduler()).fresh()
    assert stats.accounting_errors == ()
    assert (stats.pages_free, stats.pages_in_nodes, stats.pages_running) == (95, 3, 2)
    assert (stats.frames_free, stats.frames_running, stats.sinks_total - stats.sinks_free) == (2, 1, 1)
    # Contexts: two leaves of 2 pages, and the running request of 1 page and 40 tokens.
    assert (stats.contexts, stats.conversations) == (3, 3)
    assert (stats.logical_tokens, stats.stored_tokens) == (4 * P + P + 40, 3 * P + 40)
    assert stats.dedup == stats.branch_dedup * stats.prefix_dedup == (5 * P + 40) / (3 * P + 40)
    fp16_token = 2 * 2 * 3 * 32 * len(LAYOUTS)
    assert stats.fp16_unshared_bytes == (5 * P + 40) * fp16_token
    assert stats.fp16_shared_bytes == (3 * P + 40) * fp16_token
    assert stats.times_unshared_fp16 == stats.fp16_unshared_bytes / stats.used_bytes
    assert stats.times_shared_fp16 == stats.fp16_shared_bytes / stats.used_bytes
    assert stats.ratio == fp16_token * P / sum(layout.page_bytes for layout in LAYOUTS)
    assert (stats.requests, stats.prompt_tokens, stats.hit_tokens) == (2, 130, 32)
    assert (stats.evictions, stats.evicted_tokens, stats.encoded_tokens) == (1, 64, 64)
    assert [(node.id, node.parent, node.tokens, node.contexts, node.running) for node in stats.nodes] == [
        (5, 0, P, 3, 1), (6, 5, P, 1, 0), (7, 5, P, 1, 0),
    ]  # fmt: skip


def test_an_accounting_error_is_shown_and_reported_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "SHORTEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(facts, "COST_SHARE", 1e9)  # always due
    live = scheduler()
    live.token_to_kv_pool_allocator.get_all_free_pages = lambda: torch.arange(11, PAGES + 1)
    live.tree_cache.facts = facts.LiveFacts(live)
    reported: list[str] = []
    live.invariant_checker = SimpleNamespace(_report_leak=lambda _, message: reported.append(message))
    facts.when_idle(None, live)
    assert reported == [], "it was not idle"
    live.is_fully_idle = lambda: True
    facts.when_idle(None, live)
    facts.when_idle(None, live)
    assert reported == ["5 pages lost (owned by nobody): [1, 2, 3, 4, 10]"]


def test_json_and_back() -> None:
    stats = facts.LiveFacts(scheduler(keep_tokens=True)).fresh()
    values = stats.as_dict()
    assert StoreStats.from_dict(json.loads(json.dumps(values))) == stats
    assert all(type(value) in (int, float, str, bool, list, dict) for value in values.values())
    assert all(type(value) in (int, str, list) for node in values["nodes"] for value in node.values())


def test_what_nobody_asked_for_is_taken_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, cost=0.5)
    taken: list[float] = []

    def snapshot(_scheduler: object) -> dict[str, Any]:
        clock.now += clock.cost
        taken.append(clock.now)
        return {**real, "taken_at_s": clock.now}

    real = facts.snapshot(scheduler())
    monkeypatch.setattr(facts, "snapshot", snapshot)
    monkeypatch.setattr(facts, "time", SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now))
    live = facts.LiveFacts(None)
    for _ in range(10_000):
        live.recent()
        clock.now += 0.1
    assert sum(clock.cost for _ in taken) <= (clock.now - 100) / 200 + clock.cost
    seldom = len(taken)
    live.fresh()
    assert len(taken) == seldom + 1, "who asks gets an answer"


def test_history_keeps_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    real = facts.snapshot(scheduler())
    monkeypatch.setattr(facts, "snapshot", lambda _: {**real, "taken_at_s": clock.now, "hit_tokens": int(clock.now)})
    monkeypatch.setattr(facts, "time", SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now))
    live = facts.LiveFacts(None)
    for _ in range(2000):
        live.fresh()  # as while a dashboard looks on
        clock.now += 1.0
    history = live.fresh().history
    assert len(history["time_s"]) == facts.SAMPLES
    assert set(np.diff(history["time_s"])) == {facts.SAMPLE_SECONDS}
    assert history["hit_tokens"] == history["time_s"]
    for _ in range(2000):
        live.keep_history()  # as while nobody does
        clock.now += 1.0
    assert list(live.fresh().history) == list(history)
    assert set(np.diff(live.fresh().history["time_s"])) == {facts.SAMPLE_SECONDS}
    assert clock.now - live.fresh().history["time_s"][-1] <= facts.SAMPLE_SECONDS
    assert clock.now - 2000 - history["time_s"][-1] <= facts.SAMPLE_SECONDS


def test_what_decode_reads() -> None:
    """Against a loop over tokens: whole packed tiles of which a query sees something, and raw tokens that it sees."""
    windows = [None, 0, 20]
    layouts = [*LAYOUTS, PageLayout(Format(4, 2), 2, 64, P)]
    reads, expected = DecodeReads(layouts, windows), 0.0
    generator = np.random.default_rng(1)
    for _ in range(20):
        lengths = generator.integers(1, 90, size=3)
        reads.count(torch.from_numpy(lengths))
        for layout, window in zip(layouts, windows, strict=True):
            for length in lengths.tolist():
                packed = length // 16 * 16
                seen = [token for token in range(length) if window is None or token >= length - 1 - window]
                tiles = {token // 16 for token in seen if token < packed}
                expected += len(tiles) * 16 * layout.page_bytes / P
                expected += sum(token >= packed for token in seen) * layout.frame_bytes / 16
    assert reads.steps == 20
    assert reads.bytes == expected  # whole tiles and whole tokens: nothing is rounded
