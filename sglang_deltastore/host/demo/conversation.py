"""What the demo says, and what the radix tree must answer from: two users, one tool prompt, a branch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """One request: who asks, what, and after how many of that user's earlier turns."""

    user: str
    label: str
    question: str
    after_turns: int


#: The two users take turns; the last request asks Ada's second turn differently.
TURNS = (
    Turn("Ada", "turn 1", "I left a red scarf in the basket this morning. What can you do for me?", 0),
    Turn("Ben", "turn 1", "How much is an hour on a cargo bicycle if I have no plan?", 0),
    Turn("Ada", "turn 2", "It was on the ride from the station to the library.", 1),
    Turn("Ben", "turn 2", "And with the plan for students?", 1),
    Turn("Ada", "turn 3", "How long will it take until you know?", 2),
    Turn("Ben", "turn 3", "Then change my plan, please.", 2),
    Turn("Ada", "turn 2 anew", "Never mind the scarf. The brake of that bicycle is loose.", 1),
)


def system_prompt() -> str:
    """The tool prompt that all users share, about 2,200 tokens of SmolLM2."""
    tools = files(__package__).joinpath("tools.json").read_text()
    return (
        "You answer the customers of a bicycle rental. Be brief and friendly. You may call these tools:\n"
        + json.dumps(json.loads(tools))
    )


class History:
    """The messages of each user's conversation."""

    def __init__(self) -> None:
        self._turns: dict[str, list[tuple[str, str]]] = {}

    def messages(self, turn: Turn) -> list[Message]:
        """What to send for `turn`: the tool prompt, the user's earlier turns, the question."""
        messages = [{"role": "system", "content": system_prompt()}]
        for question, answer in self._turns.get(turn.user, [])[: turn.after_turns]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": turn.question}]

    def remember(self, turn: Turn, answer: str) -> None:
        self._turns.setdefault(turn.user, []).append((turn.question, answer))


class StoredSequences:
    """Every token sequence that the server has stored so far: an independent word on what must hit."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._sequences: list[list[int]] = []

    def expected_hit_tokens(self, prompt_ids: list[int]) -> int:
        """All whole pages that the prompt shares with anything stored, short of its last token."""
        shared = max((_common_prefix(prompt_ids, stored) for stored in self._sequences), default=0)
        return min(shared, len(prompt_ids) - 1) // self._page_tokens * self._page_tokens

    def add(self, prompt_ids: list[int], output_ids: list[int]) -> None:
        """The last token of an answer is sampled but never run, so it is not stored."""
        self._sequences.append([*prompt_ids, *output_ids[:-1]])


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
