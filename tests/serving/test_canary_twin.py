"""The offline twin computes a prompt in the pieces in which a server has."""

from __future__ import annotations

from benchmarks.serving.canary import _pieces
from benchmarks.serving.client import Answer


def test_a_hit_keeps_the_cuts_of_what_it_found() -> None:
    def answer(cached_tokens: int) -> Answer:
        return Answer(0, cached_tokens, [], 0.0, 0.0)

    shared, one, other = list(range(48)), [1] * 60, [2] * 60
    prompts = [shared + one[:20], shared + one, shared + other, other]
    answers = [answer(0), answer(64), answer(48), answer(0)]
    assert _pieces(prompts, answers) == [[0, 68], [0, 64, 108], [0, 48, 108], [0, 60]]
    third_turn = [*prompts, shared + one + one], [*answers, answer(96)]
    assert _pieces(*third_turn)[-1] == [0, 64, 96, 168]
