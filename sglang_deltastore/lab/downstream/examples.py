"""A task's examples: a context to cache, and what is asked behind it. Whoever makes them raises DataError
where the data cannot."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_WORD = r"[A-Za-z][\w'-]*"
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


class DataError(ValueError):
    """The data given cannot make what was asked for."""


@dataclass(frozen=True)
class Retrieval:
    """Greedy tokens after the question; right when the first match of `pattern` is `answer`."""

    context_ids: list[int]
    question_ids: list[int]
    answer: str
    pattern: str


@dataclass(frozen=True)
class Choice:
    """Right when the choice of the greatest log-likelihood per character is number `answer`."""

    context_ids: list[int]
    question_ids: list[int]
    choices: tuple[str, ...]
    answer: int


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def first_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a").input_ids)[:1] == [bos] else []


def filler_ids(tokenizer: Any, text: str | None, tokens: int, rng: random.Random) -> list[int]:
    """`tokens` ids of consecutive text from a random place, or of generated sentences without `text`."""
    if text is None:
        sentence = encode(tokenizer, _FILLER)
        return (sentence * (tokens // len(sentence) + 1))[:tokens]
    # a token is at least one character, and rarely more than eight
    start = rng.randrange(max(1, len(text) - 8 * tokens))
    ids = encode(tokenizer, text[start : start + 8 * tokens])
    if len(ids) < tokens:
        raise DataError(f"filler text of {len(text)} characters: too short for {tokens} tokens; give a longer file")
    return ids[:tokens]


def passkey_examples(tokenizer: Any, filler: str | None, tokens: int, count: int, seed: int) -> list[Retrieval]:
    """Contexts of exactly `tokens` tokens, the key at depths spread evenly from the start to the end."""
    rng = random.Random(seed)
    intro = first_ids(tokenizer) + encode(
        tokenizer,
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n",
    )
    examples = []
    for number in range(count):
        key = str(rng.randrange(10_000, 100_000))
        needle = encode(tokenizer, f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        room = tokens - len(intro) - len(needle)
        if room < 0:
            raise DataError(f"passkey of {tokens} tokens: needs at least {len(intro) + len(needle)}")
        filling = filler_ids(tokenizer, filler, room, rng)
        depth = round(room * (number + 0.5) / count)
        context = intro + filling[:depth] + needle + filling[depth:]
        question = encode(tokenizer, "\nWhat is the pass key? The pass key is")
        examples.append(Retrieval(context, question, key, r"\d+"))
    return examples


def kv_examples(tokenizer: Any, rows: Sequence[dict] | None, tokens: int, count: int, seed: int) -> list[Retrieval]:
    """Contexts of at most `tokens` tokens. rows: lost-in-the-middle's {ordered_kv_records, key, value}; random
    UUIDs without. The wanted record's place is spread evenly; every example has as many records as fit."""
    rng = random.Random(seed)
    intro = first_ids(tokenizer) + encode(
        tokenizer,
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{",
    )
    examples = []
    for number in range(count):
        if rows:
            row = rows[number % len(rows)]
            wanted = (row["key"], row["value"])
            others = [tuple(record) for record in row["ordered_kv_records"] if record[0] != row["key"]]
        else:
            wanted, *others = (tuple(_random_uuid(rng) for _ in range(2)) for _ in range(tokens // 20))
        lines = [encode(tokenizer, f' "{key}": "{value}",\n') for key, value in (wanted, *others)]
        question = encode(tokenizer, f'}}\n\nKey: "{wanted[0]}"\nCorresponding value: "')
        kept, used = [], len(intro) + len(lines[0])
        for line in lines[1:]:
            if used + len(line) > tokens:
                break
            kept.append(line)
            used += len(line)
        if used > tokens:
            raise DataError(f"kv of {tokens} tokens: needs at least {used}")
        kept.insert(round(len(kept) * (number + 0.5) / count), lines[0])
        examples.append(Retrieval([*intro, *chain.from_iterable(kept)], question, wanted[1], _UUID))
    return examples


def _random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def last_word_examples(
    tokenizer: Any, passages: Sequence[str], filler: str | None, tokens: int, count: int, seed: int
) -> list[Retrieval]:
    """Contexts of exactly `tokens` tokens: filler, then a passage up to its last word. The context's last token is
    the question, so the passage itself is read from the cache."""
    rng = random.Random(seed)
    examples = []
    for passage in rng.sample(list(passages), min(count, len(passages))):
        body, word = passage.rstrip().rsplit(maxsplit=1)
        body_ids = encode(tokenizer, "\n\n" + body)
        room = tokens + 1 - len(body_ids) - len(first_ids(tokenizer))
        if room < 0:
            continue  # a passage longer than the context
        ids = first_ids(tokenizer) + filler_ids(tokenizer, filler, room, rng) + body_ids
        examples.append(Retrieval(ids[:-1], ids[-1:], word, _WORD))
    return examples


def piqa_examples(tokenizer: Any, rows: Sequence[dict], tokens: int, count: int, seed: int) -> list[Choice]:
    """rows: PIQA's {goal, sol1, sol2, label}. All share one context: other rows, solved, as many as fit `tokens`."""
    rows = random.Random(seed).sample(list(rows), len(rows))
    context = first_ids(tokenizer)
    for row in rows[count:]:
        solution = (row["sol1"], row["sol2"])[row["label"]]
        shot = encode(tokenizer, f"Question: {row['goal']}\nAnswer: {solution}\n\n")
        if len(context) + len(shot) > tokens:
            break
        context = context + shot
    if len(context) == len(first_ids(tokenizer)):
        raise DataError(f"piqa: {len(rows)} rows leave none to fill a context of {tokens} tokens; ask for fewer")
    return [
        Choice(
            context,
            encode(tokenizer, f"Question: {row['goal']}\nAnswer:"),
            (" " + row["sol1"], " " + row["sol2"]),
            row["label"],
        )
        for row in rows[:count]
    ]


def agreement_prompts(
    tokenizer: Any, transcripts: Sequence[str], tokens: int, count: int, seed: int
) -> list[list[int]]:
    """`count` pieces of exactly `tokens` tokens, from random places of transcripts long enough, each in turn."""
    rng = random.Random(seed)
    long_enough = [ids for ids in (encode(tokenizer, text) for text in transcripts) if len(ids) >= tokens]
    if not long_enough:
        raise DataError(f"agreement: none of {len(transcripts)} transcripts has {tokens} tokens; ask for fewer")
    prompts = []
    for number in range(count):
        ids = long_enough[number % len(long_enough)]
        start = rng.randrange(len(ids) - tokens + 1)
        prompts.append(ids[start : start + tokens])
    return prompts
