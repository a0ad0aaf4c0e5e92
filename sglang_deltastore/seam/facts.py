"""Facts of a live store (`snapshot`) for whoever asks, in the scheduler's process and out of it: how fresh, at what
cost, with every page looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import zmq
from sglang.srt.runtime_context import get_parallel

from ..observe.census import SLICE_SECONDS, Census
from ..observe.drift import Drift
from ..observe.guard import GUARD
from ..observe.history import History
from ..observe.hit_curve import HitCurve
from ..observe.nodes import Node
from ..observe.stats import StoreStats
from .kv_pool import packed_pool
from .snapshot import is_with_windows, snapshot, untracked_tokens, whole_contexts
from .tree import DeltaRadixCache

STATE_KEY = "deltastore"

COST_SHARE, SHORTEST_PAUSE_SECONDS = 1 / 200, 1.0
"""Snapshots take at most this part of the scheduler's time; those that nobody asked for (metrics, log lines, history)
come no oftener than this besides."""

ANSWER_SECONDS, IDLE_SECONDS = 0.25, 1.0
"""How long an idle scheduler looks at pages at a stretch: for who asks for facts, and of itself. It stops within a
slice when a request comes."""


class LiveFacts:
    """Snapshots of one scheduler's store, and their history. `listeners` are called with every new one."""

    def __init__(self, scheduler: Any, replica: int = 0) -> None:
        self.listeners: list[Callable[[StoreStats], None]] = []
        self._replica = replica
        self._scheduler, self._tree = scheduler, scheduler.tree_cache
        self._latest: StoreStats | None = None
        self._taken_at_s = self._cost_s = 0.0
        self._history = History()
        #: of each part of the store one, the current one last; empty: none is under way
        self._censuses: list[Census] = []
        self._found: tuple[str, ...] = ()
        #: of the tree that the censuses in hand look at; of the tree when the last one was done
        self._looked_at_version = self._settled_version = -1
        self._settled_at_s: float | None = None
        self._census_errors: tuple[str, ...] = ()

    def fresh(self) -> StoreStats:
        """The facts now."""
        started = time.perf_counter()
        values = snapshot(self._scheduler)
        # Nodes that the facts have lost sight of were not looked at.
        looked_at_all = self._settled_version == self._tree.version and not values["untracked_tokens"]
        values["census_current"] = looked_at_all and not values["frames_running"]
        values["census_age_s"] = -1.0 if self._settled_at_s is None else started - self._settled_at_s
        values["accounting_errors"] += self._census_errors
        self._history.add(values)
        columns = self._history.columns()
        cost_s = time.perf_counter() - started
        self._latest = StoreStats(**values, replica=self._replica, history=columns, snapshot_seconds=cost_s)
        for listener in self.listeners:
            listener(self._latest)
        self._taken_at_s = time.perf_counter()
        self._cost_s = self._taken_at_s - started
        return self._latest

    @property
    def _affordable(self) -> bool:
        return time.perf_counter() >= self._taken_at_s + self._cost_s / COST_SHARE

    @property
    def due(self) -> bool:
        """Whether enough time has passed for a snapshot that nobody asked for."""
        return self._affordable and time.perf_counter() >= self._taken_at_s + SHORTEST_PAUSE_SECONDS

    def recent(self) -> StoreStats:
        """Facts for free, or nearly: the latest ones, unless new ones are due."""
        return self.fresh() if self._latest is None or self.due else self._latest

    def asked(self) -> StoreStats:
        """Facts for who waits for them: new ones if they are affordable, or if nothing runs that they would hold up."""
        idle = self._scheduler.is_fully_idle()
        if idle:
            self.settle(ANSWER_SECONDS)
        return self.fresh() if self._latest is None or idle or self._affordable else self._latest

    def settle(self, most_seconds: float) -> None:
        """Look at pages while nothing runs and nobody knocks, until all are looked at or the time is over."""
        until = time.perf_counter() + most_seconds
        while self._settled_version != self._tree.version:
            self._look_on()
            if someone_knocks(self._scheduler) or time.perf_counter() >= until:
                return

    def _look_on(self) -> None:
        """A slice of a census, of new ones if the tree has changed."""
        tree = self._tree
        if not self._censuses or self._looked_at_version != tree.version:
            self._censuses, self._found = censuses(tree, self._scheduler.token_to_kv_pool_allocator), ()
            self._looked_at_version = tree.version
        if (errors := self._censuses[-1].go_on(SLICE_SECONDS)) is None:
            return
        self._found += errors
        self._censuses.pop()
        if not self._censuses:
            self._census_errors = () if untracked_tokens(tree) else self._found + level_errors(self._scheduler)
            self._settled_version = self._looked_at_version
            self._settled_at_s = time.perf_counter()

    def when_idle(self) -> tuple[str, ...]:
        """For while nothing runs: looks at the pages after a burst of work, and keeps the history. Returns what was
        found wrong, once."""
        if self._settled_version != self._tree.version:
            self.settle(IDLE_SECONDS)
            if self._settled_version == self._tree.version:
                return self.fresh().accounting_errors
        elif self._history.due(time.time()):
            self.recent()
        return ()


def censuses(tree: DeltaRadixCache, allocator: Any) -> list[Census]:
    """One of each part of the store, none begun."""
    page_tokens, nodes = tree.page_size, tree.mirror.order
    store = packed_pool(allocator.get_kvcache()).store
    free_pages = whole_contexts(allocator).get_all_free_pages()
    found = [Census(store.num_pages, page_tokens, free_pages, nodes, tree.slots_of)]
    if is_with_windows(allocator):
        free_pages = allocator.swa_attn_allocator.get_all_free_pages()

        def slots_of(node: Node) -> torch.Tensor:
            return allocator.translate_loc_from_full_to_swa(tree.slots_of(node))

        found.append(Census(store.num_window_pages, page_tokens, free_pages, nodes, slots_of, may_lack=True))
    return found


def level_errors(scheduler: Any) -> tuple[str, ...]:
    levels = packed_pool(scheduler.token_to_kv_pool_allocator.get_kvcache()).store.levels
    return levels.errors() if levels else ()


def someone_knocks(scheduler: Any) -> bool:
    """Whether a message waits for the scheduler; also where that cannot be seen."""
    sockets = (scheduler.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc)
    return not all(isinstance(socket, zmq.Socket) and not socket.poll(0) for socket in sockets)


def attach(_info: dict[str, Any], scheduler: Any) -> None:
    """AFTER Scheduler.get_init_info, which SGLang calls once the scheduler is built."""
    if isinstance(scheduler.tree_cache, DeltaRadixCache):
        scheduler.tree_cache.facts = LiveFacts(scheduler, get_parallel().dp_rank or 0)
        pool = packed_pool(scheduler.token_to_kv_pool_allocator.get_kvcache())
        # The facts of the first rank are those that are read.
        if get_parallel().attn_tp_rank == 0:
            scheduler.tree_cache.hit_curve = HitCurve(pool.store.num_pages, pool.store.size.page_tokens)
            if pool.calibration:
                pool.drift = Drift(pool.calibration.layers)


def when_idle(scheduler: Any) -> None:
    """BEFORE Scheduler.on_idle, at whose end SGLang may sleep until a message comes."""
    tree = scheduler.tree_cache
    if not isinstance(tree, DeltaRadixCache) or tree.facts is None or not scheduler.is_fully_idle():
        return
    if errors := GUARD.watch("while idle", tree.facts.when_idle):
        # SGLang's own reaction to a leak: stop, or warn where its strict check was turned off.
        scheduler.invariant_checker._report_leak("deltastore", "; ".join(errors))


def add_to_internal_state(_result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER SchedulerInternalStateController._add_topology: out to the HTTP server's process."""
    tree = controller.scheduler.tree_cache
    if isinstance(tree, DeltaRadixCache):
        facts = GUARD.watch("facts are asked for", lambda: tree.facts.asked().as_dict())
        if facts is not None:
            state[STATE_KEY] = facts
