"""The soak's own parts: it must see what it is there to see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from benchmarks.serving.soak import (
    CAPACITY_TOKENS,
    CLIENTS,
    PAGE_TOKENS,
    PAUSES_PER_LIFE,
    Outcome,
    _check_idle,
    _sum_up,
)
from benchmarks.serving.soak_clients import Clients, Probe
from tests.serving.fake_server import FakeServer, fake_server

PAGES = CAPACITY_TOKENS // PAGE_TOKENS


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture
def clients(server: FakeServer) -> Iterator[Clients]:
    running = Clients(server.url, 4, seed=0)
    running.probes = [Probe.ask_idle(server.url, [7] * 30, 5)]
    yield running
    running.stop()


def load(clients: Clients, seconds: float = 1.5) -> bool:
    clients.begin()
    time.sleep(seconds)
    return clients.pause(timeout_s=30)


def test_clients_do_everything_and_go_on_after_a_pause(clients: Clients) -> None:
    assert load(clients, 4)
    assert clients.failures == []
    assert {"turns", "branches", "long_answers", "hung_up", "killed", "flushes", "probes"} <= clients.counts.keys()
    assert clients.counts["aborted_too_late"] > 0  # this server does not know of aborts
    before = clients.counts.total()
    time.sleep(0.3)
    assert clients.counts.total() == before
    assert load(clients)
    assert clients.counts.total() > before


def test_errors_are_findings_unless_the_server_was_taken_away(server: FakeServer, clients: Clients) -> None:
    server.refuses = True
    assert load(clients, 0.5)
    assert any("HTTPError" in failure for failure in clients.failures)
    server.refuses, server.step_s = False, 0.3
    clients.failures.clear()
    clients.begin()
    time.sleep(0.5)
    clients.server_goes()
    server.lost_tokens, server.step_s = 1, 0.0  # what is under way now ends wrongly
    assert clients.pause(timeout_s=60)
    assert clients.failures == []
    assert clients.counts["cut_off_by_restart"] > 0


def test_a_request_that_hangs_is_seen(server: FakeServer, clients: Clients) -> None:
    server.step_s = 1.0
    clients.begin()
    time.sleep(0.3)
    assert not clients.pause(timeout_s=0.5)
    server.step_s = 0.0


def test_a_probe_that_changes_is_seen(clients: Clients) -> None:
    probe = clients.probes[0]
    clients.probes = [Probe(probe.prompt, probe.cold_ids, probe.hit_ids, [value - 0.6 for value in probe.logprobs])]
    assert load(clients, 4)
    assert any("differs by 0.600 nats" in failure for failure in clients.failures)


def stats(**changes: object) -> SimpleNamespace:
    idle = {
        "pages_running": 0, "frames_running": 0, "accounting_errors": (), "pages_free": PAGES, "pages_in_nodes": 0,
        "frames_free": CLIENTS, "census_current": True, "untracked_tokens": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**idle, **changes})


@pytest.mark.parametrize(
    ("before_flush", "after_flush", "complaint"),
    [
        ({}, {}, ""),
        ({"pages_free": PAGES - 3, "pages_in_nodes": 2}, {}, f"{PAGES - 3} pages free, 2 in nodes"),
        ({"frames_running": 1}, {}, "'frames_running': 1"),
        ({"census_current": False}, {}, "'census_current': False"),
        ({}, {"untracked_tokens": 32}, "'untracked_tokens': 32"),
        ({"accounting_errors": ("page 3 has two owners",)}, {}, "two owners"),
        ({}, {"pages_free": PAGES - 1}, f"'pages_free': {PAGES - 1}"),
        ({}, {"frames_free": CLIENTS - 1}, f"'frames_free': {CLIENTS - 1}"),
    ],
)
def test_lost_pages_and_frames_are_seen(
    server: FakeServer, before_flush: dict[str, object], after_flush: dict[str, object], complaint: str
) -> None:
    snapshots = iter([stats(**before_flush), stats(**after_flush)])
    outcome = Outcome()
    _check_idle(SimpleNamespace(url=server.url, settled_stats=lambda timeout_s: next(snapshots)), [], outcome, "here")
    assert (len(outcome.failures), complaint in "".join(outcome.failures)) == (bool(complaint), True)


def test_other_answers_are_seen(server: FakeServer) -> None:
    probe = Probe.ask_idle(server.url, [7] * 30, 5)
    outcome = Outcome()
    changed = [Probe(probe.prompt, [2] * 6, [1] * 6, probe.logprobs)]
    _check_idle(SimpleNamespace(url=server.url, settled_stats=lambda timeout_s: stats()), changed, outcome, "here")
    assert "a probe of 30 tokens has other cold_ids [1, 1, 1, 1]..., before [2, 2, 2, 2]..." in outcome.failures[0]


def test_growing_memory_and_missing_deeds_are_seen() -> None:
    flat, growing = [100.0] * PAUSES_PER_LIFE, [100.0, *([120.0] * (PAUSES_PER_LIFE - 1))]
    clients = SimpleNamespace(counts={"turns": 1}, failures=["one"], worst_probe_nats=0.1)
    calm, grown = Outcome(rss_mb=[flat]), Outcome(rss_mb=[flat, growing])
    _sum_up(calm, clients, lives=2)
    _sum_up(grown, clients, lives=2)
    assert not any("grew" in failure for failure in calm.failures)
    assert "resident memory grew by 20.0 MB" in grown.failures[-1]
    assert {"one", "there were no aborted: this soak has tested nothing of them"} <= set(calm.failures)
    assert not any("no turns" in failure or "no restarts" in failure for failure in calm.failures)
