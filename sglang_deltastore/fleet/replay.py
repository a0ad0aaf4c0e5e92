"""Replay a trace through a cache of a given size: what hits, what is computed, what is evicted, how long users wait.

Two clocks:
- in order (`costs=None`): a request ends before the next begins. Hits then depend on the trace and the cache alone.
- timed: `Costs` gives measured rates. `workers` GPUs share one queue (first come, first served) and one cache, as
  behind a cache-aware router; a request holds its pages from its start until its answer is complete.

Behind the cache there may be storages, as HiCache has them: host memory, then files. Each is written through and keeps
what was used last, so that it holds what the one before it holds and more; what only it holds is loaded instead of
computed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import add, mul

from .formats import Request
from .page_pool import Cache, Running, Sharing, sharing_in
from .prefix_tree import ID_BYTES, whole_blocks

_SAMPLES = 256
_BUCKETS_PER_E_FOLD = 100
_SHORTEST_S = 1e-6


@dataclass(frozen=True)
class Costs:
    """Rates of one GPU (or tensor-parallel group), measured by the user.

    prefill_tokens_per_s: prompt tokens computed; decode_tokens_per_s: answer tokens of all running requests together;
    stream_tokens_per_s: answer tokens of one request, so how long it keeps its pages.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    stream_tokens_per_s: float
    workers: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be more than 0")


@dataclass(frozen=True)
class Storage:
    """A level behind the cache. page_s: to load a page; 0 where time does not matter."""

    cache: Cache
    page_s: float = 0.0


@dataclass(frozen=True)
class _Started:
    """A request that runs, in the cache and in each storage that has room for it. found_pages: of its prompt, wherever;
    load_s: to load those of them that the cache has not."""

    levels: list[tuple[Cache, Running]]
    found_pages: int
    load_s: float


class Durations:
    """Quantiles of durations to within 1%, in bounded memory: counts in logarithmic buckets."""

    def __init__(self) -> None:
        self.count = self.finite = 0
        self._total_s = 0.0
        self._buckets: dict[float, int] = {}

    def add(self, duration_s: float) -> None:
        """math.inf: it never ends."""
        bucket = math.inf
        if duration_s < math.inf:
            bucket = round(math.log(max(duration_s, _SHORTEST_S)) * _BUCKETS_PER_E_FOLD)
            self.finite += 1
            self._total_s += duration_s
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1

    def mean_s(self) -> float:
        """Of those that end; nan when none does."""
        return self._total_s / self.finite if self.finite else math.nan

    def quantile_s(self, share: float) -> float:
        """The least duration that `share` of all do not exceed; nan when there are none."""
        below = 0
        for bucket in sorted(self._buckets):
            below += self._buckets[bucket]
            if below >= share * self.count:
                return math.exp(bucket / _BUCKETS_PER_E_FOLD)
        return math.nan


@dataclass(frozen=True)
class Outcome:
    """What one replay found. Tokens are of prompts; `hit_tokens` + those of `loaded_tokens` + `computed_tokens` =
    `prompt_tokens`.

    loaded_tokens: found in a storage and nowhere before it, by storage.
    hit_tokens_at: `hit_tokens` by level, finest first; begun_tokens_at: computed ones by the level they were first
    stored at, without refused requests'; worst_hit_share: of the request whose hit was coarsest, its bytes over those
    of the finest level; demoted_pages, spared_pages: those that were encoded again, and how many of the finest level
    would have had to be evicted for the same room.
    rejected_*: requests larger than the whole cache, which a server refuses; their tokens count as computed.
    ttft_*: None one after another; quantiles count a refused request as one that waits forever, the mean does not.
    resident: (seconds since the trace began, pages in the tree), evenly thinned to at most 256 points.
    """

    capacity_pages: int | None
    requests: int
    rejected_requests: int
    rejected_tokens: int
    prompt_tokens: int
    hit_tokens: int
    loaded_tokens: tuple[int, ...]
    hit_tokens_at: tuple[int, ...]
    worst_hit_share: float
    begun_tokens_at: tuple[int, ...]
    answer_tokens: int
    block_references: int
    evicted_pages: int
    evicted_nodes: int
    demoted_pages: int
    spared_pages: float
    resident_pages: int
    peak_pages: int
    resident: tuple[tuple[float, int], ...]
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.hit_tokens - sum(self.loaded_tokens)

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that was found, wherever."""
        return 1 - self.computed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Replay:
    """One cache and the requests that pass through it: `arrive` for each in order of time, then `outcome`.
    storages: behind it, the nearest first."""

    def __init__(self, cache: Cache, costs: Costs | None = None, storages: Sequence[Storage] = ()) -> None:
        self.cache, self.costs, self.storages = cache, costs, storages
        self._loaded_pages = [0] * len(storages)
        self._requests = self._rejected_requests = self._rejected_tokens = 0
        self._prompt_tokens = self._answer_tokens = 0
        self._hit_pages_at = [0] * len(cache.page_sizes)
        self._begun_tokens_at = [0] * len(cache.page_sizes)
        self._worst_hit_size: float = cache.page_sizes[0]
        self._block_references = self._partial_blocks = 0
        self._resident: list[tuple[float, int]] = []
        self._sample_every = 1
        self._waiting: deque[Request] = deque()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._event_count = self._in_flight = self._busy = 0
        self._ttft = Durations()

    def arrive(self, request: Request) -> None:
        """A request comes in, not before any earlier one."""
        blocks = len(request.blocks) // ID_BYTES
        self._requests += 1
        self._prompt_tokens += request.prompt_tokens
        self._answer_tokens += request.answer_tokens
        self._block_references += blocks
        self._partial_blocks += blocks - whole_blocks(request.blocks)
        if self.costs is None:
            self._serve_at_once(request)
        else:
            self._advance(request.time_s)
            self._waiting.append(request)
            self._start_waiting(request.time_s)
        if self._requests % self._sample_every == 0:
            self._sample(request.time_s)

    def outcome(self) -> Outcome:
        """Serve what still waits, and sum up."""
        self._advance(math.inf)
        timed = self._ttft.count > 0
        tree = self.cache.tree
        hit_tokens_at = tuple(pages * self.cache.page_tokens for pages in self._hit_pages_at)
        return Outcome(
            capacity_pages=self.cache.capacity_pages,
            requests=self._requests,
            rejected_requests=self._rejected_requests,
            rejected_tokens=self._rejected_tokens,
            prompt_tokens=self._prompt_tokens,
            hit_tokens=sum(hit_tokens_at),
            loaded_tokens=tuple(pages * self.cache.page_tokens for pages in self._loaded_pages),
            hit_tokens_at=hit_tokens_at,
            begun_tokens_at=tuple(self._begun_tokens_at),
            worst_hit_share=self._worst_hit_size / self.cache.page_sizes[0],
            answer_tokens=self._answer_tokens,
            block_references=self._block_references,
            evicted_pages=tree.evicted_pages,
            evicted_nodes=tree.evicted_nodes,
            demoted_pages=tree.demoted_pages,
            spared_pages=tree.freed_by_demotion / tree.page_sizes[0],
            resident_pages=tree.pages,
            peak_pages=self.cache.peak_pages,
            resident=tuple(self._resident),
            ttft_mean_s=self._ttft.mean_s() if timed else None,
            ttft_p50_s=self._ttft.quantile_s(0.5) if timed else None,
            ttft_p90_s=self._ttft.quantile_s(0.9) if timed else None,
            ttft_p99_s=self._ttft.quantile_s(0.99) if timed else None,
        )

    def sharing(self) -> Sharing:
        """Of an endless cache: what repeats, and why."""
        return sharing_in(self.cache.tree, self._block_references - self._partial_blocks)

    def _serve_at_once(self, request: Request) -> None:
        running = self.cache.admit(request)
        if running is None:
            self._reject(request)
            return
        started = self._begin(running)
        self._prefilled(started)
        self._finish(started)

    def _begin(self, running: Running) -> _Started:
        """A request that the cache has admitted begins in every storage, too."""
        self._count_hit(running)
        levels, found, load_s = [(self.cache, running)], running.hit_pages, 0.0
        for at, storage in enumerate(self.storages):
            there = storage.cache.admit(running.request)
            if there is None:
                continue
            levels.append((storage.cache, there))
            loaded = max(0, there.hit_pages - found)
            self._loaded_pages[at] += loaded
            found += loaded
            load_s += loaded * storage.page_s
        return _Started(levels, found, load_s)

    def _prefilled(self, started: _Started) -> None:
        for cache, running in started.levels:
            cache.prefilled(running)

    def _finish(self, started: _Started) -> None:
        for cache, running in started.levels:
            cache.finish(running)

    def _count_hit(self, running: Running) -> None:
        hit_tokens = running.hit_pages * self.cache.page_tokens
        self._begun_tokens_at[running.level] += running.request.prompt_tokens - hit_tokens
        if running.hit_pages:
            sizes = map(mul, running.hit_pages_at, self.cache.page_sizes)
            self._worst_hit_size = min(self._worst_hit_size, sum(sizes) / running.hit_pages)
            self._hit_pages_at = list(map(add, self._hit_pages_at, running.hit_pages_at))

    def _start_waiting(self, now_s: float) -> None:
        """Start the oldest waiting requests while there is a free worker and room."""
        while self._waiting and self._busy < self.costs.workers:
            running = self.cache.admit(self._waiting[0])
            if running is None:
                if self._in_flight:
                    return  # room comes when a running request ends
                self._reject(self._waiting.popleft())
                continue
            self._waiting.popleft()
            self._start(running, now_s)

    def _start(self, running: Running, now_s: float) -> None:
        request, costs = running.request, self.costs
        started = self._begin(running)
        self._in_flight += 1
        self._busy += 1
        computed_tokens = request.prompt_tokens - started.found_pages * self.cache.page_tokens
        first_token_s = now_s + started.load_s + computed_tokens / costs.prefill_tokens_per_s
        self._ttft.add(first_token_s - request.time_s)
        self._at(first_token_s, lambda _: self._prefilled(started))
        self._at(first_token_s + request.answer_tokens / costs.decode_tokens_per_s, self._worker_is_free)
        self._at(first_token_s + request.answer_tokens / costs.stream_tokens_per_s, lambda at: self._end(started, at))

    def _worker_is_free(self, now_s: float) -> None:
        self._busy -= 1
        self._start_waiting(now_s)

    def _end(self, started: _Started, now_s: float) -> None:
        self._finish(started)
        self._in_flight -= 1
        self._start_waiting(now_s)

    def _at(self, time_s: float, event: Callable[[float], None]) -> None:
        self._event_count += 1
        heapq.heappush(self._events, (time_s, self._event_count, event))

    def _advance(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            time_s, _, event = heapq.heappop(self._events)
            event(time_s)

    def _reject(self, request: Request) -> None:
        self._rejected_requests += 1
        self._rejected_tokens += request.prompt_tokens
        if self.costs is not None:
            self._ttft.add(math.inf)

    def _sample(self, time_s: float) -> None:
        self._resident.append((time_s, self.cache.tree.pages))
        if len(self._resident) >= _SAMPLES:
            del self._resident[::2]
            self._sample_every *= 2


def replay(requests: Iterable[Request], replays: Sequence[Replay]) -> list[Outcome]:
    """Pass every request to all replays, side by side: the trace is read once."""
    for request in requests:
        for each in replays:
            each.arrive(request)
    return [each.outcome() for each in replays]
