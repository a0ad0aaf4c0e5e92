"""Observing on a GPU that is not there: requests that end, nodes that are evicted, facts, metrics and the census."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import zmq
from prometheus_client import CollectorRegistry, Counter, Gauge

from sglang_deltastore.observe.guard import GUARD
from sglang_deltastore.observe.series import Series
from sglang_deltastore.seam import facts
from tests import budgets
from tests.net.pretend_gpu import Watch
from tests.net.test_seam import PAGE_TOKENS, Gpu, gpu
from tests.observe.live_tree import LiveTree

assert gpu  # fixture

PAGES = 64


class Observed(NamedTuple):
    live: LiveTree
    facts: facts.LiveFacts
    watch: Watch


@pytest.fixture
def observed(gpu: Gpu) -> Iterator[Observed]:
    """SGLang's real tree over slots on the pretended GPU, and a scheduler's worth of facts about it."""
    live = LiveTree(PAGES, page_tokens=PAGE_TOKENS, device="cuda", pool=gpu.backend.token_to_kv_pool)
    with zmq.Context() as context, context.socket(zmq.PULL) as quiet:
        quiet.bind("inproc://nobody")
        scheduler: Any = SimpleNamespace(
            tree_cache=live.tree, token_to_kv_pool_allocator=live.allocator, req_to_token_pool=live.rows,
            running_batch=SimpleNamespace(reqs=live.running), last_batch=None, chunked_req=None,
            recv_from_tokenizer=quiet, ipc_channels=SimpleNamespace(recv_from_rpc=quiet),
            is_fully_idle=lambda: not live.running,
        )  # fmt: skip
        live.tree.facts = facts.LiveFacts(scheduler)
        errors = GUARD.errors
        gpu.watch.waits.clear()
        yield Observed(live, live.tree.facts, gpu.watch)
        assert GUARD.errors == errors, "an observation failed: see the log"


def prompt(tokens: int, seed: int) -> list[int]:
    return [seed * 7 + i * i % 101 for i in range(tokens)]


def test_requests_that_end_and_nodes_that_go_wait_for_nothing(observed: Observed) -> None:
    live = observed.live
    for seed in (1, 2, 1, 3, 4, 1, 5, 6, 7, 8):
        req = live.begin([*prompt(60, seed), seed], None)
        live.prefilled(req)
        live.finish(req, list(range(30)))
    live.evict(200)
    assert live.tree.counts.requests == 10
    assert live.tree.counts.evictions
    assert len(observed.watch.our_waits) <= 10 * budgets.GPU_WAITS_PER_FINISHED_REQUEST, observed.watch.our_waits


def test_facts_metrics_and_the_census_wait_for_nothing(observed: Observed) -> None:
    live = observed.live
    registry = CollectorRegistry()
    counter, gauge = (partial(kind, registry=registry) for kind in (Counter, Gauge))
    observed.facts.listeners.append(Series(counter, gauge, {"tier": "k4v2"}).update)
    running = live.begin(prompt(90, 9), None)
    live.prefilled(running)
    stats = observed.facts.fresh()  # while a request runs
    assert (stats.frames_running, stats.contexts, stats.stored_tokens) == (1, 1, 90)
    live.finish(running, list(range(30)))
    for _ in range(100):
        observed.facts.when_idle()
    stats = observed.facts.asked()
    assert stats.census_current
    # The pool of this test has other requests' pages than the tree's allocator; the tree's own are looked at.
    assert not [error for error in stats.accounting_errors if "twice" in error or "wholly" in error]
    assert stats.pages_in_nodes == 120 // PAGE_TOKENS
    assert observed.watch.our_waits == []


def test_a_page_owned_twice_is_found_there_too(observed: Observed) -> None:
    live = observed.live
    req = live.begin(prompt(40, 3), None)
    live.prefilled(req)
    live.finish(req, [])
    live.allocator.free_pages = live.allocator.free_pages.clone()
    live.allocator.free_pages[0] = live.tree.all_values_flatten()[0] // PAGE_TOKENS
    live.tree.version += 1
    found: tuple[str, ...] = ()
    for _ in range(100):
        found = found or observed.facts.when_idle()
    assert any("owned twice" in error for error in found)
