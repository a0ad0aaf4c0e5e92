"""One trace, many caches: every budget with every tier, in one pass over the trace."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import mul
from typing import Any

from tqdm import tqdm

from ..policy.precision import CHOSEN, SGLANGS, Policy
from .kv import FP16, KvTier
from .page_pool import DEFAULT_CHUNK_TOKENS, Cache, Sharing
from .replay import Costs, Outcome, Replay, Storage
from .tables import Model
from .traces import Trace

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)(k|M|G|T|)(B|iB|)")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_SCALE = {"": 1, "k": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MAX_WORKERS = 4096

Shape = tuple[int, tuple[float, ...], Policy, tuple[tuple[int, float], ...]]
"""Of a cache: its pages, their sizes by level, its policy; with one level the size is 1, whatever its bytes. Of each
storage behind it: its pages, and the seconds to load one."""


@dataclass(frozen=True)
class Budget:
    """KV memory of the whole fleet: in tokens of fp16 KV, or in bytes."""

    text: str
    amount: float
    in_bytes: bool

    def bytes(self, model: Model) -> float:
        return self.amount if self.in_bytes else self.amount * FP16.bytes_per_token(model)


def parse_budget(text: str) -> Budget:
    """`4M`: memory of four million fp16 tokens; `80GB`, `64GiB`: that many bytes."""
    match = _BUDGET.fullmatch(text)
    if not match or not float(match[1]):
        raise ValueError(f"budget {text!r}: give fp16 tokens as 500k, 4M, or bytes as 80GB, 64GiB; more than 0")
    scale = _BINARY_SCALE if match[3] == "iB" else _SCALE
    return Budget(text, float(match[1]) * scale[match[2]], in_bytes=bool(match[3]))


@dataclass(frozen=True)
class StorageBudget:
    """Memory behind the fleet's KV memory; bytes_per_s: at which it is read, None where time does not matter."""

    name: str
    budget: Budget
    bytes_per_s: float | None


def parse_storage(text: str) -> StorageBudget:
    """`host=256GB`, and where time matters `host=256GB@25GB`, read with 25 GB a second."""
    name, _, rest = text.partition("=")
    size, _, rate = rest.partition("@")
    if not name or not size:
        raise ValueError(f"storage {text!r}: give NAME=SIZE or NAME=SIZE@SPEED, such as host=256GB@25GB")
    per_s = parse_budget(rate) if rate else None
    if per_s and not per_s.in_bytes:
        raise ValueError(f"storage {text!r}: its speed is in bytes a second, such as 25GB")
    return StorageBudget(name, parse_budget(size), per_s.amount if per_s else None)


@dataclass(frozen=True)
class Row:
    """One cache's replay. capacity_tokens: at its coarsest level; level_bits: of a stored value, scales included, by
    level; workers_needed: the fewest for which nine in ten wait at most the target."""

    budget: str
    tier: str
    capacity_tokens: int
    level_bits: tuple[float, ...]
    outcome: Outcome
    workers_needed: int | None

    @property
    def mean_hit_bits(self) -> float:
        """Of a value that was hit; nothing hit: of the finest level."""
        found = self.outcome.hit_tokens_at
        return sum(map(mul, found, self.level_bits)) / sum(found) if any(found) else self.level_bits[0]

    @property
    def worst_hit_bits(self) -> float:
        """The same of the request whose hit was coarsest."""
        return self.outcome.worst_hit_share * self.level_bits[0]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: a wait that never ends is None."""
        outcome = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self.outcome).items()
        }
        derived = {"hit_rate": self.outcome.hit_rate, "computed_tokens": self.outcome.computed_tokens}
        derived |= {"mean_hit_bits": self.mean_hit_bits, "worst_hit_bits": self.worst_hit_bits}
        rest = {"budget": self.budget, "tier": self.tier, "capacity_tokens": self.capacity_tokens}
        return {**rest, **derived, **outcome, "workers_needed": self.workers_needed}


@dataclass(frozen=True)
class Study:
    """Rows by budget, then tier; `endless` is the same trace through a cache without end."""

    rows: list[Row]
    endless: Outcome
    sharing: Sharing
    skipped: int
    errors: list[str]


def study(
    trace: Trace,
    model: Model,
    budgets: Sequence[Budget],
    tiers: Sequence[KvTier],
    costs: Costs | None = None,
    ttft_target_s: float | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    budget_per_worker: bool = False,
    storages: Sequence[StorageBudget] = (),
) -> Study:
    """Replay the trace through every budget x tier, with the storages behind each. With costs, `ttft_target_s` also
    asks how many workers it takes; with `budget_per_worker` each of them brings budget and storages along."""
    page_tokens = trace.page_tokens
    if costs and any(storage.bytes_per_s is None for storage in storages):
        raise ValueError("storages need their speed where time matters, such as host=256GB@25GB")
    configurations = [
        (budget, tier, shape_of(budget, tier, model, page_tokens, storages)) for budget in budgets for tier in tiers
    ]

    def new_replay(shape: Shape, workers: int) -> Replay:
        pages, page_sizes, policy, behind = shape
        times = workers if budget_per_worker else 1
        timed = replace(costs, workers=workers) if costs else None
        new_cache = partial(Cache, page_tokens=page_tokens, pages_per_block=trace.pages_per_block,
                            chunk_tokens=chunk_tokens)  # fmt: skip
        cache = new_cache(pages * times, page_sizes=page_sizes, policy=policy)
        return Replay(cache, timed, [Storage(new_cache(held * times), page_s) for held, page_s in behind])

    endless = Replay(Cache(None, page_tokens, trace.pages_per_block, chunk_tokens))
    workers = costs.workers if costs else 1
    # Twice the budget in fp16 holds what the budget holds in fp8: caches of one shape are replayed once.
    by_shape = {shape: new_replay(shape, workers) for _, _, shape in configurations}
    run_all(trace, [endless, *by_shape.values()], "replay")
    found = {shape: each.outcome() for shape, each in by_shape.items()}
    outcomes = [found[shape] for _, _, shape in configurations]
    skipped, errors = trace.skipped, list(trace.errors)
    needed: list[int | None] = [None] * len(configurations)
    if costs and ttft_target_s is not None:
        trials = [partial(new_replay, shape) for _, _, shape in configurations]
        needed = workers_needed(trace, trials, ttft_target_s)
    rows = []
    for (budget, tier, _), outcome, fewest in zip(configurations, outcomes, needed, strict=True):
        capacity_tokens = (outcome.capacity_pages or 0) * page_tokens
        rows.append(Row(budget.text, tier.label, capacity_tokens, tier.bits(model, page_tokens), outcome, fewest))
    return Study(rows, endless.outcome(), endless.sharing(), skipped, errors)


def shape_of(
    budget: Budget, tier: KvTier, model: Model, page_tokens: int, storages: Sequence[StorageBudget] = ()
) -> Shape:
    """Of the cache that a budget makes. One level is counted in pages: caches of as many pages are the same. Storages
    hold pages of the last level."""
    sizes = tier.page_bytes(model, page_tokens)
    policy = CHOSEN.get(tier.name, SGLANGS)
    behind = tuple(
        (int(each.budget.bytes(model) // sizes[-1]), sizes[-1] / each.bytes_per_s if each.bytes_per_s else 0.0)
        for each in storages
    )
    return int(budget.bytes(model) // sizes[-1]), sizes if len(sizes) > 1 else (1,), policy, behind


def run_all(trace: Trace, replays: Sequence[Replay], what: str) -> None:
    """One pass; a progress bar on a terminal, measured in bytes of the file."""
    size = trace.path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=None, leave=False) as bar:
        for number, request in enumerate(trace):
            for each in replays:
                each.arrive(request)
            if number % 64 == 0:
                bar.update(trace.bytes_read - bar.n)
        bar.update(size - bar.n)


def workers_needed(trace: Trace, new_replays: Sequence[Callable[[int], Replay]], target_s: float) -> list[int | None]:
    """For each of several caches (a function from workers to a new replay) the fewest workers with a p90 time to first
    token of at most `target_s`, or None when 4096 are not enough. Doubles, then halves the interval; each step is one
    pass over the trace for all caches together."""
    count = len(new_replays)
    enough: list[int | None] = [None] * count
    too_few, trial = [0] * count, [1] * count
    while pending := [at for at in range(count) if too_few[at] < MAX_WORKERS and enough[at] != too_few[at] + 1]:
        replays = {at: new_replays[at](trial[at]) for at in pending}
        run_all(trace, list(replays.values()), f"up to {max(trial[at] for at in pending)} workers")
        for at, each in replays.items():
            p90_s = each.outcome().ttft_p90_s
            if p90_s is None or p90_s <= target_s:
                enough[at] = trial[at]
            else:
                too_few[at] = trial[at]
            trial[at] = min(2 * trial[at], MAX_WORKERS) if enough[at] is None else (too_few[at] + enough[at]) // 2
    return enough
