"""Which sink is whose: a raw copy of a first token, one for all sequences that begin with the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

NO_SINK = -1

Beginning = Hashable
"""What a sequence's first key and value follow from. Position 0 attends to itself alone, so that its token decides."""


def beginning_with(first_token: int, adapter: str | None = None) -> Beginning:
    return first_token, adapter


class SecondLevel(Protocol):
    """Where written sinks go that the table loses, and may come back from."""

    def keep(self, beginning: Beginning, sink: int) -> None: ...

    def bring_back(self, beginning: Beginning, sink: int) -> bool:
        """Whether it was there; then it is in `sink` now."""

    def clear(self) -> None: ...

    @property
    def nbytes(self) -> int: ...


@dataclass
class _Sink:
    id: int
    frames: int = 0
    is_written: bool = False


class SinkTable:
    """Sinks 1 .. total on the host, each free or of all sequences with one beginning. Sink 0 belongs to nobody.

    A sink is kept while running requests (known by their frames) or cached sequences begin so. It is written once, by
    the first request that runs: another would round the same token as its own batch does. Where none is free, the
    beginning that has been without a running request for longest loses its cached sequences, and with them its sink.
    There always is one, as there are more sinks than frames: every sequence has its sink, whatever else is cached.

    Sequences that come back from host memory bring no sink: it comes from the second level. Where that has lost it,
    they are read without, from their pages.
    """

    def __init__(self, num_sinks: int) -> None:
        self.total = num_sinks
        #: beginnings whose cached sequences were evicted for their sink
        self.evictions = 0
        #: takes all sequences with a beginning out of the cache, and calls `uncache`; whoever caches sets it
        self.evict: Callable[[Beginning], None] = self.uncache
        self.second_level: SecondLevel | None = None
        self.clear()

    def clear(self) -> None:
        """Nothing runs and nothing is cached."""
        self._free = list(range(self.total, 0, -1))
        self._sinks: dict[Beginning, _Sink] = {}
        self._running: dict[int, Beginning] = {}
        self._cached: set[Beginning] = set()
        #: beginnings of cached sequences alone, in the order in which their last requests ended
        self._idle: dict[Beginning, None] = {}
        if self.second_level:
            self.second_level.clear()

    @property
    def free(self) -> int:
        return len(self._free)

    def hold(self, beginnings: Mapping[int, Beginning]) -> None:
        """The requests in these frames begin so, until `release`."""
        if not self.total:
            return
        # Those that have a sink first: none of them may lose it to another.
        for frame, beginning in sorted(beginnings.items(), key=lambda item: item[1] not in self._sinks):
            if self._running.get(frame) == beginning:
                continue
            self.release(frame)
            if beginning not in self._sinks:
                self._sinks[beginning] = sink = _Sink(self._take())
                sink.is_written = bool(self.second_level and self.second_level.bring_back(beginning, sink.id))
            self._running[frame] = beginning
            self._sinks[beginning].frames += 1
            self._idle.pop(beginning, None)

    def release(self, frame: int) -> None:
        """The request in this frame, if there is one, runs no more."""
        if frame in self._running:
            beginning = self._running.pop(frame)
            self._sinks[beginning].frames -= 1
            self._settle(beginning)

    def cache(self, beginning: Beginning) -> None:
        """A sequence that begins so is cached."""
        self._cached.add(beginning)

    def copy(self, beginning: Beginning) -> None:
        """The second level has its sink from now on, if there is one, and its sequences keep it."""
        sink = self._sinks.get(beginning)
        if sink and sink.is_written and self.second_level:
            self.second_level.keep(beginning, sink.id)

    def uncache(self, beginning: Beginning) -> None:
        """No sequence is cached any more that begins so."""
        self._cached.discard(beginning)
        if beginning in self._sinks:
            self._settle(beginning)

    def of_frame(self, frame: int) -> int:
        """The sink that the request in this frame reads, or NO_SINK."""
        sink = self._sinks[self._running[frame]] if frame in self._running else None
        return sink.id if sink and sink.is_written else NO_SINK

    def to_write(self, frame: int) -> int:
        """The same if nobody has been told to write it yet, which this call does; else 0."""
        sink = self._sinks[self._running[frame]] if frame in self._running else None
        if sink is None or sink.is_written:
            return 0
        sink.is_written = True
        return sink.id

    def _take(self) -> int:
        if not self._free:
            self.evictions += 1
            self.evict(next(iter(self._idle)))
        return self._free.pop()

    def _settle(self, beginning: Beginning) -> None:
        sink = self._sinks[beginning]
        if sink.frames:
            return
        if beginning in self._cached:
            self._idle[beginning] = None
            return
        self._idle.pop(beginning, None)
        if sink.is_written and self.second_level:
            self.second_level.keep(beginning, sink.id)
        del self._sinks[beginning]
        self._free.append(sink.id)
