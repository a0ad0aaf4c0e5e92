"""A context read back from a cache: greedy answers, likelihoods of choices."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .examples import Choice, Retrieval, encode

#: returns a fresh transformers cache for one sequence, or None for the plain one
CacheFactory = Callable[[], Any]


def prefilled(model: Any, context_ids: Sequence[int], make_cache: CacheFactory) -> Any:
    """A fresh cache that holds the context."""
    from transformers import DynamicCache

    cache = make_cache()
    if cache is None:
        cache = DynamicCache(config=model.config)
    model(_row(model, context_ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def greedy(model: Any, cache: Any, question_ids: Sequence[int], new_tokens: int) -> list[int]:
    """Up to `new_tokens` greedy ids behind the question; ends before the model's end-of-text token."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    found: list[int] = []
    ids = question_ids
    while len(found) < new_tokens:
        logits = model(_row(model, ids), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        ids = [token]
    return found


def log_likelihood(model: Any, cache: Any, question_ids: Sequence[int], choice_ids: Sequence[int]) -> float:
    """Nats of the choice behind the question. The cache grows."""
    ids = [*question_ids, *choice_ids]
    logits = model(_row(model, ids), past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
    first = len(question_ids)
    return sum(float(logits[first + place - 1, token]) for place, token in enumerate(choice_ids))


def _row(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(ids)], device=model.device)


def retrieved(model: Any, tokenizer: Any, example: Retrieval, make_cache: CacheFactory) -> bool:
    cache = prefilled(model, example.context_ids, make_cache)
    # some tokens more than the answer has: a space, a quote, the next word
    new_tokens = len(encode(tokenizer, " " + example.answer)) + 4
    answer = tokenizer.decode(greedy(model, cache, example.question_ids, new_tokens))
    match = re.search(example.pattern, answer)
    return bool(match) and match[0] == example.answer


def choices_right(model: Any, tokenizer: Any, examples: Sequence[Choice], make_cache: CacheFactory) -> Iterator[bool]:
    """One prefill for all: the examples share their context, as requests share a tool prompt."""
    cache = prefilled(model, examples[0].context_ids, make_cache)
    for example in examples:
        assert example.context_ids == examples[0].context_ids, "choices must share one context"
        scores = [
            log_likelihood(model, copy.deepcopy(cache), example.question_ids, encode(tokenizer, choice)) / len(choice)
            for choice in example.choices
        ]
        yield scores.index(max(scores)) == example.answer


def agreed_tokens(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """Tokens before the two continuations differ; `limit` where they never do (both may have ended early)."""
    if first == second:
        return limit
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
