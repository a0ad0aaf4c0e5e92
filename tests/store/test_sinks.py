"""Whose a sink is, over random lives of requests and of what is cached of them."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sglang_deltastore.store.sinks import NO_SINK, SinkTable

FRAMES, CACHED = 4, 3


class Lives(RuleBasedStateMachine):
    """Requests begin, some together, write their first token, are cached, end; what is cached goes.

    Beside the table a model that knows no table: what each sink holds, and what each sequence would read.
    """

    running = Bundle("running")

    @initialize()
    def empty(self) -> None:
        self.table = SinkTable(FRAMES + CACHED)
        self.table.evict = self.evict
        self.tokens: dict[int, int] = {}  # of frames that run
        self.cached: dict[int, int] = {}  # how many cached sequences begin with a token
        self.content: dict[int, int] = {}  # of a sink: the token it was written with
        self.reads: dict[int, int] = {}  # the sink of sequences that begin with a token and are written

    def evict(self, token: int) -> None:
        assert token not in self.tokens.values(), "a running request loses what it reads"
        assert token in self.cached, "nothing was to be had from it"
        del self.cached[token]
        self.table.uncache(token)

    @rule(target=running, tokens=st.lists(st.integers(0, 20), min_size=1, max_size=FRAMES))
    def begin(self, tokens: list[int]) -> int:
        frames = [frame for frame in range(1, FRAMES + 1) if frame not in self.tokens][: len(tokens)]
        begun = dict(zip(frames, tokens, strict=False))
        self.tokens.update(begun)
        self.table.hold(begun)
        for frame, token in begun.items():  # the step that follows
            if sink := self.table.to_write(frame):
                assert sink == self.table.of_frame(frame)
                self.content[sink], self.reads[token] = token, sink
        return frames[0] if frames else 0

    @rule(frame=running)
    def go_on(self, frame: int) -> None:
        """A chunk that follows asks for its row again, and writes nothing more."""
        if frame in self.tokens:
            self.table.hold({frame: self.tokens[frame]})
            assert self.table.to_write(frame) == 0

    @rule(frame=running)
    def is_cached(self, frame: int) -> None:
        if frame in self.tokens:
            token = self.tokens[frame]
            self.cached[token] = self.cached.get(token, 0) + 1
            self.table.cache(token)

    @rule(frame=consumes(running))
    def end(self, frame: int) -> None:
        self.tokens.pop(frame, None)
        self.table.release(frame)

    @rule(token=st.integers(0, 20))
    def uncache_one(self, token: int) -> None:
        if token in self.cached:
            self.cached[token] -= 1
            if not self.cached[token]:
                del self.cached[token]
                self.table.uncache(token)

    @rule()
    def flush(self) -> None:
        if not self.tokens:
            self.table.clear()
            self.cached.clear()

    @invariant()
    def every_sequence_reads_its_own_first_token(self) -> None:
        for frame, token in self.tokens.items():
            assert self.table.of_frame(frame) == self.reads[token], "it has no sink, or another than others"
        for token in {*self.tokens.values(), *self.cached}:
            assert self.content[self.reads[token]] == token

    @invariant()
    def counts_add_up(self) -> None:
        assert self.table.total - self.table.free == len({*self.tokens.values(), *self.cached})


TestLives = Lives.TestCase


def test_whoever_begins_together_takes_no_other_s_sink() -> None:
    table = SinkTable(2)
    table.evict = table.uncache
    for token in (7, 8):
        table.hold({1: token})
        table.to_write(1)
        table.cache(token)
        table.release(1)
    table.hold({1: 9, 2: 7})  # 7 ended first: it would be the first to go
    assert (table.of_frame(2), table.to_write(2)) == (1, 0)
    assert (table.to_write(1), table.of_frame(1), table.evictions) == (2, 2, 1)


def test_the_beginning_goes_that_has_ended_first() -> None:
    gone = []
    table = SinkTable(3)
    table.evict = lambda token: (gone.append(token), table.uncache(token))
    for frame, token in enumerate((5, 6, 7), 1):
        table.hold({frame: token})
        table.cache(token)
    for frame in (2, 1, 3):
        table.release(frame)
    table.hold({1: 6})  # runs once more
    table.release(1)
    for frame, token in ((1, 8), (2, 9)):
        table.hold({frame: token})
    assert gone == [5, 7]


@pytest.mark.parametrize("cached", [True, False])
def test_without_sinks_nobody_has_one(cached: bool) -> None:
    """Raw layers alone."""
    table = SinkTable(0)
    table.hold({1: 5})
    if cached:
        table.cache(5)
    table.release(1)
    assert (table.of_frame(1), table.to_write(1), table.free, table.evictions) == (NO_SINK, 0, 0, 0)
