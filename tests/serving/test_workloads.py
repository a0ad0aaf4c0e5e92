"""Workloads: what is asked, in which order, and that every side could get it again."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.serving.workloads import (
    MOONCAKE_SCALE,
    WORKLOADS,
    Prompt,
    Request,
    Sizes,
    Texts,
    WorkloadError,
    build,
)
from tests.serving.data import MOONCAKE_IDS, REPLIES, write_workloads

SIZES = Sizes(sessions=3, turns=4, context_tokens=512, system_tokens=120, answer_tokens=4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Texts:
    return Texts(write_workloads(tmp_path_factory.mktemp("workloads") / "data"), smollm2)


def sessions_of(requests: list[Request]) -> dict[int, list[Prompt]]:
    sessions: dict[int, list[Prompt]] = defaultdict(list)
    for request in requests:
        sessions[request.session].append(request.prompt)
    return sessions


def begins_with(prompt: Prompt, start: Prompt) -> bool:
    return prompt[: len(start)] == start


@pytest.mark.parametrize("name", WORKLOADS)
def test_sizes_hold_and_a_seed_means_the_same_requests(texts: Texts, name: str) -> None:
    requests = build(name, texts, SIZES, seed=1)
    sessions = sessions_of(requests)
    assert len(sessions) == SIZES.sessions
    assert all(2 <= len(prompts) <= SIZES.turns for prompts in sessions.values())
    assert all(0 < len(request.prompt) <= SIZES.context_tokens - SIZES.answer_tokens for request in requests)
    assert build(name, texts, SIZES, seed=1) == requests
    assert build(name, texts, SIZES, seed=2) != requests or name == "mooncake"  # all its conversations are taken


@pytest.mark.parametrize("name", ["airline", "tools", "fleet"])
def test_every_turn_goes_on_from_the_one_before(texts: Texts, name: str) -> None:
    for prompts in sessions_of(build(name, texts, SIZES)).values():
        for earlier, later in pairwise(prompts):
            assert begins_with(later, earlier)
            assert len(later) > len(earlier)


def test_sessions_are_mixed(texts: Texts) -> None:
    """Neither one session after the other nor in rounds: both would say too much, or too little, of a cache."""
    order = [request.session for request in build("airline", texts, replace(SIZES, sessions=8), seed=3)]
    assert order != sorted(order)
    assert any(len(set(order[start : start + 8])) < 8 for start in range(0, len(order), 8))


def test_all_airline_users_share_the_policy_and_nothing_else(texts: Texts) -> None:
    first, second, *_ = (prompts[0] for prompts in sessions_of(build("airline", texts, SIZES)).values())
    common = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert SIZES.system_tokens <= common < SIZES.system_tokens + 20  # what the template puts around it, "This is user"


def test_sessions_with_the_same_tools_share_them(texts: Texts) -> None:
    sizes = replace(SIZES, sessions=12)
    starts = {tuple(prompts[0][:100]) for prompts in sessions_of(build("tools", texts, sizes)).values()}
    assert len(starts) == 2  # files or trade


def test_branches_ask_again_and_part(texts: Texts) -> None:
    sizes = replace(SIZES, sessions=12, turns=2 * REPLIES)
    trees = [
        prompts for prompts in sessions_of(build("branches", texts, sizes)).values() if len(prompts) == 2 * REPLIES
    ]
    assert len(trees) == 8  # the other four are dialogues
    for prompts in trees:
        again = max(prompts.count(prompt) for prompt in prompts)
        assert (again, len({tuple(prompt) for prompt in prompts})) == (REPLIES, 2)
        assert begins_with(max(prompts, key=len), min(prompts, key=len))


def test_fleet_groups_share_their_system_prompt(texts: Texts) -> None:
    sessions = sessions_of(build("fleet", texts, replace(SIZES, sessions=8)))
    starts = [tuple(sessions[session][0][: SIZES.system_tokens]) for session in range(8)]
    assert [starts.index(start) for start in starts] == [0, 0, 0, 0, 4, 4, 4, 4]


def test_mooncake_keeps_blocks_and_order(texts: Texts) -> None:
    """Equal blocks are equal tokens; requests come as recorded; what has no second request is left out."""
    requests = build("mooncake", texts, SIZES)
    block_tokens = 512 // MOONCAKE_SCALE
    assert [len(request.prompt) // block_tokens for request in requests] == [len(ids) for ids in MOONCAKE_IDS[:-1]]
    words: dict[int, Prompt] = {}
    for request, ids in zip(requests, MOONCAKE_IDS, strict=False):
        for number, block in enumerate(ids):
            found = request.prompt[number * block_tokens : (number + 1) * block_tokens]
            assert words.setdefault(block, found) == found
    assert len({tuple(tokens) for tokens in words.values()}) == len(words)
    assert [request.session for request in requests[:3]].count(requests[0].session) == 2


def test_what_cannot_be_built_is_said(texts: Texts, tmp_path: Path, smollm2: Path) -> None:
    with pytest.raises(WorkloadError, match="fewer than 40 sessions"):
        build("tools", texts, replace(SIZES, sessions=40))
    with pytest.raises(WorkloadError, match="nothing there matches tau_bench"):
        build("airline", Texts(tmp_path, smollm2), SIZES)
    with pytest.raises(WorkloadError, match="known are airline, tools"):
        build("airlines", texts, SIZES)
    with pytest.raises(WorkloadError, match="context_tokens=9000"):
        replace(SIZES, context_tokens=9000)
