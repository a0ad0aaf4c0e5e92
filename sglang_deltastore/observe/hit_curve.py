"""What the hit rate would be with more or less memory, from the pages that requests have asked for.

Of each size of memory there is a cache beside the real one, which holds names of pages alone, and few of them: only
pages whose hash is below a threshold are looked at, and each stands for 1 / rate of them, in a cache scaled alike
(SHARDS: Waldspurger et al., FAST 2015; miniature simulations: the same, USENIX ATC 2017). The rate is fixed: as the
largest size is known, that bounds what is kept.

SGLang evicts leaves, least recently used first, so of a context its end goes before its beginning. Here a context's
pages are therefore used from its last to its first: what holds a page then holds all before it, and a request's hits
are a prefix, as the tree's are. What the tree does besides is left out: it evicts whole nodes, and none that a running
request holds; a split renews what was not used.

Prompts of all users may begin alike, and few pages of that are sampled, or none. What requests really found is known,
and so by how much sampling is off for that; it is as much off for every size.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Memory that is asked about, in times of the present; fields of stats.StoreStats are named after them."""

MOST_SAMPLED = 2**15
"""Pages in the largest cache; 10 MiB in all. A million tokens in pages of 16 are sampled at 1/15, so that a prompt of
100K tokens has 400 sampled pages, and takes 0.5 ms each time it is looked up or used."""

WINDOW_SIZES, LEAST_WINDOW_TOKENS = 16, 2**20
"""Recent requests: those that have asked for as many prompt tokens as the present memory holds this many times, or for
so many; twice as many at most."""

PageKeys = npt.NDArray[np.uint64]

_HASHES = 2**64
_STEP = np.uint64(0x9E3779B97F4A7C15)
#: of splitmix64 (Steele, Lea, Flood, 2014): shifts, and the factor behind each
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


def page_keys(token_ids: array[int], page_tokens: int, namespace: Hashable = None) -> PageKeys:
    """A hash of each whole page with all before it, [pages]: equal for equal tokens after equal ones. token_ids: 64-bit
    integers; namespace: what else tells equal tokens apart."""
    tokens = np.frombuffer(token_ids, np.uint64)
    pages = tokens[: len(tokens) // page_tokens * page_tokens].reshape(-1, page_tokens)
    own = (pages * _weights(page_tokens)).sum(1, dtype=np.uint64)
    own += np.arange(len(own), dtype=np.uint64) * _STEP + _number_of(namespace)
    return _mixed(np.cumsum(_mixed(own), dtype=np.uint64))


def _number_of(namespace: Hashable) -> np.uint64:
    """The same in every process, as hash() is not: what is sampled is then the same, too."""
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(namespace).encode(), digest_size=8).digest(), "little"))


def _weights(count: int) -> PageKeys:
    return _mixed(np.arange(1, count + 1, dtype=np.uint64) * _STEP) | np.uint64(1)


def _mixed(numbers: PageKeys) -> PageKeys:
    """Each number's bits in all others' places."""
    for shift, factor in _MIX:
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers ^ (numbers >> _LAST_SHIFT)


class Lru:
    """The names of the pages that were used last."""

    def __init__(self, capacity_pages: int) -> None:
        self._capacity_pages = capacity_pages
        #: the least recently used first
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def held(self, pages: Sequence[int]) -> int:
        """How many of these it holds: the first ones, as whoever uses pages uses all before them, and those last."""
        return bisect_left(pages, True, key=lambda page: page not in self._pages)

    def use(self, pages: Iterable[int]) -> None:
        """These were used, the last of them last."""
        for page in pages:
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._capacity_pages:
            self._pages.popitem(last=False)


@dataclass
class Asked:
    """What prompts have asked for in a while. Sampling says: sampled_hit_pages of those that were found, hit_pages by
    size."""

    prompt_tokens: int = 0
    hit_tokens: int = 0
    sampled_hit_pages: float = 0.0
    hit_pages: list[float] = field(default_factory=lambda: [0.0] * len(SIZES))


class HitCurve:
    """Of one tree in `capacity_pages`. Pages go by their keys, see `page_keys`.

    rate: share of pages that are looked at; window_tokens: of prompts, after which the oldest are forgotten.
    """

    def __init__(
        self, capacity_pages: int, page_tokens: int, rate: float | None = None, window_tokens: float | None = None
    ) -> None:
        self.page_tokens, self.capacity_pages = page_tokens, capacity_pages
        self.rate = min(1.0, MOST_SAMPLED / (capacity_pages * SIZES[-1])) if rate is None else rate
        self._highest = np.uint64(min(int(self.rate * _HASHES), _HASHES - 1))
        least = max(WINDOW_SIZES * capacity_pages * page_tokens, LEAST_WINDOW_TOKENS)
        self._window_tokens = least if window_tokens is None else window_tokens
        self._sizes_pages = [int(capacity_pages * size) for size in SIZES]
        self.clear()

    def clear(self) -> None:
        """Nothing is stored."""
        self._caches = [Lru(round(pages * self.rate)) for pages in self._sizes_pages]
        self._recent, self._before = Asked(), Asked()

    def asked(self, keys: PageKeys, prompt_tokens: int, hit_tokens: int) -> None:
        """A request is admitted, and has found the first hit_tokens of its prompt stored. keys: of the pages that it
        may find."""
        if self._recent.prompt_tokens >= self._window_tokens:
            self._recent, self._before = Asked(), self._recent
        self._recent.prompt_tokens += prompt_tokens
        self._recent.hit_tokens += hit_tokens
        places = np.flatnonzero(keys <= self._highest)
        pages, prompt_pages = keys[places].tolist(), -(-prompt_tokens // self.page_tokens)
        found = int(np.searchsorted(places, hit_tokens // self.page_tokens))
        self._recent.sampled_hit_pages += self._pages_up_to(places, found)
        for at in self._that_hold(prompt_pages):
            self._recent.hit_pages[at] += self._pages_up_to(places, self._caches[at].held(pages))

    def used(self, keys: PageKeys) -> None:
        """The tree holds a context of these pages, and a request has it."""
        pages = keys[keys <= self._highest][::-1].tolist()
        for at in self._that_hold(len(keys)):
            self._caches[at].use(pages)

    @property
    def prompt_tokens(self) -> int:
        """Of the requests that the curve is about."""
        return self._recent.prompt_tokens + self._before.prompt_tokens

    @property
    def hit_rate(self) -> float:
        """Share of their tokens that they have found; 0 where there are none."""
        return (self._recent.hit_tokens + self._before.hit_tokens) / max(self.prompt_tokens, 1)

    def hit_rates(self) -> dict[float, float]:
        """By size: of the present one what was found, of others what sampling says, less what it is off for that."""
        found, pages = self.hit_rate, self._recent.sampled_hit_pages + self._before.sampled_hit_pages
        off = pages * self.page_tokens / max(self.prompt_tokens, 1) - found
        rates = {}
        for size, rate in self.sampled_hit_rates().items():
            least, most = found if size >= 1 else 0.0, found if size <= 1 else 1.0
            rates[size] = min(max(rate - off, least), most)
        return rates

    def sampled_hit_rates(self) -> dict[float, float]:
        """By size, from sampling alone."""
        pages = np.add(self._recent.hit_pages, self._before.hit_pages)
        rates = pages * self.page_tokens / max(self.prompt_tokens, 1)
        return dict(zip(SIZES, rates.tolist(), strict=True))

    def _pages_up_to(self, places: npt.NDArray[np.int64], hits: int) -> float:
        """Where hits end of which so many are sampled, at these places: as they are a prefix, between the last of them
        and the next sampled page. On average over what may be sampled that is 1 / rate behind the beginning of the
        last; what is too much then, prompts without a sampled hit lack."""
        return int(places[hits - 1]) + 1 / self.rate if hits else 0.0

    def _that_hold(self, pages: int) -> range:
        """Sizes that a context of so many pages fits; smaller ones would refuse it."""
        return range(bisect_left(self._sizes_pages, pages), len(SIZES))
