"""Precision follows need: which pages give up bits, which go, and how fine new ones begin.

A cache holds its pages at levels, finest first. A page begins at one of them and only sinks: it is encoded again,
coarser, and frees the difference; from the last level, the floor, it is evicted. A cache of one level is one of a fixed
tier.

Everything here is a pure function of what a cache knows of a run of pages (`Use`) and of itself. A rank changes only
when its pages are used or a branch comes or goes: a heap that is corrected as it is read keeps the order, and nothing
is ranked again because time passes.

Time is counted in turnovers: how often the cache could have been filled by what was stored so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from deltastore_kernels.layout import Format

from .tiers import ADAPTIVE, TIERS

LEVELS = tuple(TIERS[name].format for name in (*ADAPTIVE.levels, "k2v2"))

LADDERS: dict[str, tuple[Format, ...]] = {
    "adaptive": tuple(TIERS[name].format for name in ADAPTIVE.levels),
    "adaptive-k2v2": LEVELS,
}
"""Levels by name: of the served tier that has some, and of another to compare."""

REST_TURNOVERS = 1 / 16
"""New pages begin at a level whose coldest page has rested so long: what they push down was not encoded just now."""


class Use(Protocol):
    """What is known of a run of pages of one context, all at one level.

    used_at: the count of operations at the last use; used_turnovers: the time then; hits: requests that found it;
    heat: see `warmed`; contexts: of how many branches it is a part; end_pages: pages from the context's beginning to
    its end. Pages of one rank are of one level, so that a rank of pages is one of bytes.
    """

    used_at: int
    used_turnovers: float
    hits: int
    heat: float
    contexts: int
    end_pages: int


Rank = Callable[[Use, float], float]
"""How much pages would be missed, given a half-life: those of the least rank are the first to sink or go. Twice as many
hits, or sharers, or half the depth, put that off by a half-life, in turnovers."""


def recency(use: Use, _half_life: float) -> float:
    """Least recently used first, as SGLang evicts."""
    return use.used_at


def sharing(use: Use, half_life: float) -> float:
    """Recency, and what many branches share stays longer."""
    return use.used_turnovers + half_life * math.log2(use.contexts)


def density(use: Use, _half_life: float) -> float:
    """Hits for each byte and time, where a hit fades with its age."""
    return use.heat


def frequency(use: Use, half_life: float) -> float:
    """Recency, and what was often hit stays longer, however long ago."""
    return use.used_turnovers + half_life * math.log2(1 + use.hits)


def position(use: Use, half_life: float) -> float:
    """Recency, and the beginnings of contexts stay longer."""
    return use.used_turnovers - half_life * math.log2(1 + use.end_pages)


RANKS: dict[str, Rank] = {rank.__name__: rank for rank in (recency, sharing, density, frequency, position)}


def warmed(heat: float, now_turnovers: float, half_life: float) -> float:
    """Heat after a use now: the time at which a single use would count as much as all so far, each halved every
    `half_life`. Of a single use it is the time of that."""
    cooled = 2.0 ** ((heat - now_turnovers) / half_life)
    return now_turnovers + half_life * math.log2(1 + cooled)


@dataclass(frozen=True)
class Policy:
    """Who sinks next. kept_share: the part of the budget that each level above the floor may hold before its pages
    sink while there is something to evict; 0 demotes all before anything is evicted."""

    rank: Rank = recency
    kept_share: float = 0.0
    half_life_turnovers: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.kept_share <= 1:
            raise ValueError(f"kept_share={self.kept_share}: allowed is a part of the budget from 0 to 1")

    def worth(self, use: Use) -> float:
        """Its rank."""
        return self.rank(use, self.half_life_turnovers)

    def who_pays(self, held_bytes: Sequence[int], budget_bytes: int) -> Iterator[int]:
        """Levels in the order in which they are to free bytes, given what each holds; the floor's pages are evicted.
        Each level appears, for the pages of one may all be held by running requests."""
        *above, floor = range(len(held_bytes))
        kept_bytes = self.kept_share * budget_bytes
        yield from (level for level in above if held_bytes[level] > kept_bytes)
        yield floor
        yield from (level for level in above if held_bytes[level] <= kept_bytes)


SGLANGS = Policy()
"""What it does with one level: it evicts the least recently used leaf."""

CHOSEN = {"adaptive": Policy(sharing), "adaptive-k2v2": Policy(recency, kept_share=0.25)}
"""By `make results-precision`, on halves of traces that did not judge."""


def first_level(
    wanted_bytes: Sequence[int], free_bytes: int, sinkable_bytes: int, rested_turnovers: Sequence[float]
) -> int:
    """Where new pages begin: at the finest level for which there is room, or for which room comes without evicting and
    the coldest page there has rested.

    wanted_bytes: of the new pages, by level; sinkable_bytes: that come free if all that may sink does, to the floor;
    rested_turnovers: since the last use of the coldest page that may sink, by level, 0 where there is none.
    """
    for level, wanted in enumerate(wanted_bytes):
        short = wanted - free_bytes
        if short <= 0 or (short <= sinkable_bytes and rested_turnovers[level] >= REST_TURNOVERS):
            return level
    return len(wanted_bytes) - 1
