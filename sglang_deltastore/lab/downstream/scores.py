"""A task run with each cache, and scored."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from .answers import CacheFactory, agreed_tokens, choices_right, greedy, prefilled, retrieved
from .data import TASKS, Data
from .examples import DataError, agreement_prompts, kv_examples, last_word_examples, passkey_examples, piqa_examples


@dataclass(frozen=True)
class Score:
    """One row. For "agreement", right means agreed to the last token, and mean and median count tokens."""

    task: str
    cache: str
    context_tokens: int
    right: int
    total: int
    low: float = field(init=False)
    """Wilson's 95% interval of right / total."""
    high: float = field(init=False)
    agreed_mean: float | None = None
    agreed_median: float | None = None
    agreed_limit: int | None = None

    def __post_init__(self) -> None:
        low, high = wilson(self.right, self.total)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.right / self.total}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927); z standard deviations, 1.96 for 95%."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.inference_mode()
def evaluate(
    model: Any,
    tokenizer: Any,
    task: str,
    data: Data,
    caches: dict[str, CacheFactory],
    context_tokens: int,
    count: int,
    seed: int = 0,
    new_tokens: int = 64,
) -> list[Score]:
    """One score for each of `caches` (name -> factory) on the same `count` examples. Deterministic for a seed.

    "agreement" compares with the plain cache, whatever `caches` holds.
    """
    if task == "agreement":
        prompts = agreement_prompts(tokenizer, data.transcripts, context_tokens, count, seed)
        return _agreement_scores(model, prompts, caches, new_tokens)
    if task == "passkey":
        examples = passkey_examples(tokenizer, data.filler, context_tokens, count, seed)
    elif task == "kv":
        examples = kv_examples(tokenizer, data.kv_rows, context_tokens, count, seed)
    elif task == "last_word":
        examples = last_word_examples(tokenizer, data.passages, data.filler, context_tokens, count, seed)
    elif task == "piqa":
        examples = piqa_examples(tokenizer, data.piqa_rows, context_tokens, count, seed)
    else:
        raise DataError(f"task {task!r}: unknown; known are {', '.join(TASKS)}")
    if not examples:
        raise DataError(f"{task}: no example of {context_tokens} tokens in the data given")
    scores = []
    for name, make_cache in caches.items():
        if task == "piqa":
            outcomes = choices_right(model, tokenizer, examples, make_cache)
        else:
            outcomes = (retrieved(model, tokenizer, example, make_cache) for example in examples)
        right = sum(tqdm(outcomes, f"{task} {context_tokens} {name}", len(examples), leave=False))
        scores.append(Score(task, name, context_tokens, right, len(examples)))
    return scores


def _agreement_scores(
    model: Any, prompts: Sequence[Sequence[int]], caches: dict[str, CacheFactory], new_tokens: int
) -> list[Score]:
    def continued(prompt: Sequence[int], make_cache: CacheFactory) -> list[int]:
        return greedy(model, prefilled(model, prompt[:-1], make_cache), prompt[-1:], new_tokens)

    tokens = len(prompts[0])
    plain = [continued(prompt, lambda: None) for prompt in tqdm(prompts, f"agreement {tokens} plain", leave=False)]
    scores = []
    for name, make_cache in caches.items():
        agreed = [
            agreed_tokens(expected, continued(prompt, make_cache), new_tokens)
            for prompt, expected in zip(tqdm(prompts, f"agreement {tokens} {name}", leave=False), plain, strict=True)
        ]
        scores.append(
            Score(
                "agreement",
                name,
                tokens,
                right=agreed.count(new_tokens),
                total=len(agreed),
                agreed_mean=statistics.fmean(agreed),
                agreed_median=statistics.median(agreed),
                agreed_limit=new_tokens,
            )
        )
    return scores
