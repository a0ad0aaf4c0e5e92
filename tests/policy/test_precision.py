"""Who gives up bits, who goes, how fine new pages begin: each rule by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from sglang_deltastore.policy.precision import (
    LADDERS,
    LEVELS,
    REST_TURNOVERS,
    Policy,
    Rank,
    density,
    first_level,
    frequency,
    position,
    recency,
    sharing,
    warmed,
)


@dataclass(frozen=True)
class Pages:
    """What a cache knows of a run of pages."""

    used_at: int = 10
    used_turnovers: float = 1.0
    hits: int = 0
    heat: float = 1.0
    contexts: int = 1
    end_pages: int = 8


HALF_LIFE = 0.5
PAGES = Pages()
LATER = replace(PAGES, used_at=12, used_turnovers=1.4)


def test_ladders_go_down_and_are_named_by_their_floor() -> None:
    for name, levels in LADDERS.items():
        assert list(levels) == sorted(levels, key=lambda fmt: -fmt.key_bits - fmt.value_bits), name
    assert [str(LADDERS[name][-1]) for name in ("adaptive", "adaptive-k2v2")] == ["K3V2", "K2V2"]
    assert LADDERS["adaptive-k2v2"] == LEVELS


@pytest.mark.parametrize("rank", [recency, sharing, frequency, position])
def test_what_was_used_later_is_missed_more(rank: Rank) -> None:
    assert rank(PAGES, HALF_LIFE) < rank(LATER, HALF_LIFE)


def test_recency_knows_nothing_else() -> None:
    assert recency(replace(PAGES, hits=9, contexts=9, heat=9.0, end_pages=1), HALF_LIFE) == recency(PAGES, HALF_LIFE)


@pytest.mark.parametrize(
    ("rank", "more"),
    [(sharing, {"contexts": 2}), (frequency, {"hits": 1}), (position, {"end_pages": 3.5}), (density, {"heat": 1.5})],
)
def test_twice_as_much_is_worth_a_half_life(rank: Rank, more: dict[str, float]) -> None:
    """Two branches, one hit on top of the first use, half the depth: (8 + 1) / 2 = 3.5 + 1."""
    longer = rank(replace(PAGES, **more), HALF_LIFE) - rank(PAGES, HALF_LIFE)
    assert longer == pytest.approx(HALF_LIFE)
    assert rank(replace(PAGES, **more), HALF_LIFE) > rank(LATER, HALF_LIFE) or rank is density


def test_hits_fade() -> None:
    """Two uses at once are one a half-life later; a use long ago adds nothing; each use adds."""
    assert warmed(1.0, 1.0, HALF_LIFE) == pytest.approx(1.0 + HALF_LIFE)
    assert warmed(-1e3, 2.0, HALF_LIFE) == 2.0
    heat, now = 0.0, 0.0
    for _ in range(5):
        now += 0.1
        later = warmed(heat, now, HALF_LIFE)
        assert later > max(heat, now)
        heat = later
    weights = sum(2.0 ** (-0.1 * age / HALF_LIFE) for age in range(6))
    assert 2.0 ** ((heat - now) / HALF_LIFE) == pytest.approx(weights)


def test_all_is_demoted_before_anything_is_evicted() -> None:
    assert list(Policy().who_pays((30, 50, 20), 100)) == [0, 1, 2]
    assert next(Policy().who_pays((0, 0, 100), 100)) == 2, "an empty level has nothing to give"
    assert sorted(Policy().who_pays((0, 40, 60), 100)) == [0, 1, 2], "all are asked in the end"


def test_a_level_keeps_its_share_while_something_can_be_evicted() -> None:
    policy = Policy(kept_share=0.25)
    assert list(policy.who_pays((30, 20, 50), 100)) == [0, 2, 1]
    assert list(policy.who_pays((25, 26, 49), 100)) == [1, 2, 0]
    assert list(policy.who_pays((100,), 100)) == [0], "one level: only its pages can go"


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Policy(kept_share=share)


RESTED, FRESH = (REST_TURNOVERS, 0.0, 0.0), (REST_TURNOVERS / 2, 0.0, 0.0)


@pytest.mark.parametrize(
    ("free", "sinkable", "rested", "level", "why"),
    [
        (70, 0, FRESH, 0, "there is room"),
        (69, 0, RESTED, 1, "room for the second level, and nothing may sink"),
        (69, 1, RESTED, 0, "what sinks has rested, and frees enough"),
        (69, 1, FRESH, 1, "what would sink was encoded just now"),
        (0, 69, RESTED, 2, "not all of the room comes from sinking"),
        (0, 0, FRESH, 2, "nothing is left but the floor"),
    ],
)
def test_where_new_pages_begin(free: int, sinkable: int, rested: tuple[float, ...], level: int, why: str) -> None:
    assert first_level((70, 50, 40), free, sinkable, rested) == level, why
