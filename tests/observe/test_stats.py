"""The snapshot over stand-ins for SGLang's objects: bytes against the tensors themselves, states against sets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zmq

from deltastore_kernels import ops
from deltastore_kernels.layout import RAW, Format, PageLayout
from sglang_deltastore.observe.guard import GUARD
from sglang_deltastore.observe.history import SAMPLE_SECONDS, SAMPLES
from sglang_deltastore.observe.nodes import Mirror, Node
from sglang_deltastore.observe.reads import StepCounts
from sglang_deltastore.observe.stats import StoreStats
from sglang_deltastore.policy.config import Settings
from sglang_deltastore.seam import facts, metrics
from sglang_deltastore.seam.tree import DeltaRadixCache, TreeCounts
from sglang_deltastore.store.pages import PageStore
from sglang_deltastore.store.size import StoreSize

P, PAGES, FRAMES = 32, 100, 3
#: 3 heads of 32 leave padding behind the anchors
LAYOUTS = tuple(PageLayout(Format(*bits), 3, 32, P) for bits in ((4, 3), (3, 2)))


class Tree(DeltaRadixCache):
    """Nodes 5 -> 6 and 5 -> 7, each of the page of its number."""

    page_size = P
    host_pool_group = None

    def __init__(self) -> None:  # not the real one's: there is no SGLang around it
        self.counts = TreeCounts(requests=2, prompt_tokens=130, hit_tokens=32, evictions=1, evicted_tokens=64)
        self.mirror = Mirror(P, path_of=lambda _node: ())
        stem = SimpleNamespace(node_id=5, parent_id=1, path_start=0, path_end=P)
        for node in (6, 7):
            leaf = SimpleNamespace(node_id=node, parent_id=5, path_start=P, path_end=2 * P)
            self.mirror.stored([stem, leaf], list(range(5 * P, 6 * P)) + list(range(node * P, (node + 1) * P)))

    def full_evictable_size(self) -> int:
        return 2 * P

    def full_protected_size(self) -> int:
        return P

    def slots_of(self, node: Node) -> torch.Tensor:
        return slots_of_page(node.id)


def slots_of_page(page: int) -> torch.Tensor:
    return torch.arange(page * P, (page + 1) * P)


def scheduler(layouts: tuple[PageLayout, ...] = LAYOUTS) -> Any:
    """One request runs in row 2: page 5 of the tree, then 40 tokens of its own in pages 8 and 9."""
    store = PageStore(StoreSize(layouts, FRAMES, 256), PAGES, "cpu", ops.load())
    store.sink_table.hold({2: 7})
    pool = SimpleNamespace(
        store=store, page_size=P, settings=Settings("deltastore", "k4v2"), calibration=None, drift=None,
        steps=StepCounts(layouts, [None] * len(layouts)),
        get_kv_size_bytes=lambda: store.pages_bytes + store.frames_bytes + store.sinks_bytes,
    )  # fmt: skip
    pool.steps.extended(torch.tensor([0]), torch.tensor([64]))
    kv = SimpleNamespace(holds_kv=True, req_pool_idx=2, kv_allocated_len=P + 40, cache_protected_len=P)
    request = SimpleNamespace(kv=kv, last_node=5)
    free = torch.tensor([page for page in range(1, PAGES + 1) if page not in (5, 6, 7, 8, 9)])
    live = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(
            get_kvcache=lambda: pool, get_all_free_pages=lambda: live.free, available_size=lambda: len(live.free) * P
        ),
        free=free, req_to_token_pool=SimpleNamespace(size=FRAMES, free_slots=[1, 3]),
        tree_cache=Tree(), chunked_req=None,
        recv_from_tokenizer=None, ipc_channels=SimpleNamespace(recv_from_rpc=None),
        running_batch=SimpleNamespace(reqs=[request]), last_batch=None,
        is_fully_idle=lambda: not live.running_batch.reqs,
    )  # fmt: skip
    return live


def idle() -> Any:
    """The same once the request is gone, with its pages free and its frame."""
    live = scheduler()
    live.running_batch.reqs.clear()
    live.req_to_token_pool.free_slots.append(2)
    live.free = torch.tensor([page for page in range(1, PAGES + 1) if page not in (5, 6, 7)])
    return live


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
def test_bytes_are_those_of_the_tensors(layouts: tuple[PageLayout, ...]) -> None:
    live = scheduler(layouts)
    stats, pool = facts.LiveFacts(live).fresh(), live.token_to_kv_pool_allocator.get_kvcache()
    store = pool.store
    held = sum(tensor.nbytes for tensor in tensors(store))
    assert stats.resident_bytes == held
    parts = (stats.pages_bytes, stats.frames_bytes, stats.sinks_bytes, stats.maps_bytes)
    assert parts == tuple(
        sum(tensor.nbytes for tensor in tensors(group))
        for group in (
            store.pages,
            [store.frame_key_rot, store.frame_value_rot],
            [store.sink_key_rot, store.sink_value_rot],
            store.sink_of_frame,
        )
    )
    fields = {
        name: sum(layout.field_offsets_bytes[name][1] * 3 * layout.tiles for layout in layouts) * (PAGES + 1)
        for name in ("key_codes", "value_codes", "scales", "anchors")
    }
    assert stats.codes_bytes == fields["key_codes"] + fields["value_codes"]
    assert stats.scales_bytes == fields["scales"] + fields["anchors"]
    assert stats.padding_bytes == stats.pages_bytes - sum(fields.values())
    # 5 pages, the frame of row 2, and its sink
    sinks = sum(side[0].nbytes for side in (*store.sink_key_rot, *store.sink_value_rot) if len(side))
    frames = sum(side[0].nbytes for side in (*store.frame_key_rot, *store.frame_value_rot))
    assert stats.used_bytes == 5 * sum(pages[0].nbytes for pages in store.pages) + frames + sinks


def test_states_tokens_and_counters() -> None:
    stats = facts.LiveFacts(scheduler()).fresh()
    assert stats.accounting_errors == ()
    assert (stats.pages_free, stats.pages_in_nodes, stats.pages_running, stats.pages_held) == (95, 3, 2, 1)
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


def test_an_accounting_error_is_shown_and_reported_when_idle() -> None:
    for break_it, complaint in (
        (lambda live: None, None),
        (
            lambda live: setattr(live, "free", torch.cat([live.free[1:], live.free[-1:]])),
            "1 pages lost (owned by nobod",
        ),
        (lambda live: setattr(live, "free", live.free[1:]), "pages: 96 free + 3 in nodes + 0 of running requests are"),
        (lambda live: live.req_to_token_pool.free_slots.pop(), "frames: 2 free + 0 running are not the 3 there are"),
    ):
        live, reported = idle(), []
        live.tree_cache.facts = facts.LiveFacts(live)
        live.invariant_checker = SimpleNamespace(_report_leak=lambda _, message, to=reported: to.append(message))
        break_it(live)
        for _ in range(5):
            facts.when_idle(live)
        assert [complaint in message for message in reported] == ([True] if complaint else []), reported
        stats = live.tree_cache.facts.asked()
        assert stats.census_current and 0 <= stats.census_age_s < 60
        assert bool(stats.accounting_errors) == bool(complaint)


def test_the_census_is_settled_for_who_asks_an_idle_server_and_only_then() -> None:
    live = scheduler()
    live.tree_cache.facts = observed = facts.LiveFacts(live)
    facts.when_idle(live)
    assert observed.asked().census_current is False, "a request runs"
    live = idle()
    observed = facts.LiveFacts(live)
    assert (observed.fresh().census_current, observed.fresh().census_age_s) == (False, -1.0)
    for _ in range(3):  # nobody can say here whether someone knocks: a slice each time
        stats = observed.asked()
    assert stats.census_current and stats.accounting_errors == ()
    live.tree_cache.version += 1
    assert not observed.fresh().census_current


def test_a_census_ends_at_a_knock() -> None:
    """Of a request that comes while an idle scheduler looks at pages."""
    live, slices = idle(), []
    with zmq.Context() as context, context.socket(zmq.PULL) as ear, context.socket(zmq.PULL) as other:
        hand = context.socket(zmq.PUSH)
        hand.connect(f"tcp://127.0.0.1:{ear.bind_to_random_port('tcp://127.0.0.1')}")
        live.recv_from_tokenizer, live.ipc_channels.recv_from_rpc = ear, other
        observed = facts.LiveFacts(live)
        observed._look_on = lambda: slices.append(time.sleep(0.002))
        observed.settle(0.1)
        assert len(slices) > 5
        hand.send(b"a request")
        assert ear.poll(5000)
        slices.clear()
        observed.settle(0.1)
        assert len(slices) == 1
        hand.close()


def test_observation_that_fails_is_counted_and_serving_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    live = scheduler()
    live.tree_cache.facts = facts.LiveFacts(live)
    state: dict[str, Any] = {}
    with monkeypatch.context() as broken:
        broken.setattr(facts, "snapshot", lambda _: 1 / 0)
        before = GUARD.errors
        facts.add_to_internal_state(None, SimpleNamespace(scheduler=live), state)
        assert (state, GUARD.errors) == ({}, before + 1)
        assert metrics.DeltaPoolStats._words(SimpleNamespace(facts=live.tree_cache.facts)) == []
        live.running_batch.reqs.clear()
        facts.when_idle(live)
    facts.add_to_internal_state(None, SimpleNamespace(scheduler=live), state)
    assert state["deltastore"]["observation_errors"] == GUARD.errors > before


def test_json_and_back() -> None:
    stats = facts.LiveFacts(scheduler()).fresh()
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
    live = facts.LiveFacts(scheduler())
    for _ in range(10_000):
        live.recent()
        clock.now += 0.1
    assert sum(clock.cost for _ in taken) <= (clock.now - 100) / 200 + clock.cost
    for _ in range(10_000):
        live.asked()
        clock.now += 0.1
    assert sum(clock.cost for _ in taken) <= (clock.now - 100) / 200 + clock.cost, "who asks pays no more"
    clock.cost, live._scheduler = 0.001, idle()
    for _ in range(10):
        live.asked()
        seldom = len(taken)
        live.asked()
        assert len(taken) == seldom + 1, "an idle server answers at once"


def test_history_keeps_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    real = facts.snapshot(scheduler())
    monkeypatch.setattr(facts, "snapshot", lambda _: {**real, "taken_at_s": clock.now, "hit_tokens": int(clock.now)})
    monkeypatch.setattr(facts, "time", SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now))
    live = facts.LiveFacts(scheduler())
    for _ in range(2000):
        live.fresh()  # as while a dashboard looks on
        clock.now += 1.0
    history = live.fresh().history
    assert len(history["time_s"]) == SAMPLES
    assert set(np.diff(history["time_s"])) == {SAMPLE_SECONDS}
    assert history["hit_tokens"] == history["time_s"]
    for _ in range(2000):
        live.when_idle()  # as while nobody does
        clock.now += 1.0
    assert list(live.fresh().history) == list(history)
    assert set(np.diff(live.fresh().history["time_s"])) == {SAMPLE_SECONDS}
    assert clock.now - live.fresh().history["time_s"][-1] <= SAMPLE_SECONDS
    assert clock.now - 2000 - history["time_s"][-1] <= SAMPLE_SECONDS


def test_what_decode_reads() -> None:
    """Against a loop over tokens: whole packed tiles of which a query sees something, and raw tokens that it sees."""
    windows = [None, 0, 20]
    layouts = [*LAYOUTS, PageLayout(Format(4, 2), 2, 64, P)]
    reads, expected = StepCounts(layouts, windows), 0.0
    generator = np.random.default_rng(1)
    for _ in range(20):
        lengths = generator.integers(1, 90, size=3)
        reads.decoded(torch.from_numpy(lengths))
        for layout, window in zip(layouts, windows, strict=True):
            for length in lengths.tolist():
                packed = length // 16 * 16
                seen = [token for token in range(length) if window is None or token >= length - 1 - window]
                tiles = {token // 16 for token in seen if token < packed}
                expected += len(tiles) * 16 * layout.page_bytes / P
                expected += sum(token >= packed for token in seen) * layout.frame_bytes / 16
    assert reads.decode_steps == 20
    assert reads.decode_read_bytes == expected  # whole tiles and whole tokens: nothing is rounded
