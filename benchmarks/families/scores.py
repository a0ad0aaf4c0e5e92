"""What a family's model says of a prompt: to SGLang, and to transformers, the third judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .engines import start

#: scored whole, and again behind its first part
PROMPT = [(37 * i * i + 11 * i) % 4000 + 10 for i in range(400)]
HIT_TOKENS = 288
#: the same but for its first tokens: what a wrong page would be
OTHER_CONTEXT_TOKENS = 150
OTHER = [(token + 1234) % 4000 + 10 for token in PROMPT[:OTHER_CONTEXT_TOKENS]] + PROMPT[OTHER_CONTEXT_TOKENS:]
#: answered together, so that decode steps and chunks of prompts share batches
ANSWERED = [PROMPT[:300], PROMPT[50:227], OTHER[100:164]]
ANSWER_TOKENS = 40

Logprobs = list[float]
"""Of a sequence's second and later tokens, each given all before it."""


@dataclass(frozen=True)
class Scores:
    """cold: of PROMPT. hit: of its tokens behind HIT_TOKENS, from the cache. answers: to ANSWERED, each its token ids
    and their log-probabilities as the server says them."""

    cold: Logprobs
    hit: Logprobs
    answers: list[tuple[list[int], Logprobs]]


def measured(folder: Path, options: dict[str, Any]) -> Scores:
    """Through an engine with those options."""
    engine = start(folder, **options)
    cold = _score(engine, PROMPT, 1)
    engine.flush_cache()
    _score(engine, PROMPT[:HIT_TOKENS], HIT_TOKENS - 1)
    hit = _score(engine, PROMPT, HIT_TOKENS + 1, cached_tokens=HIT_TOKENS)
    answers = engine.generate(
        input_ids=ANSWERED,
        # Sampled: the likeliest words of random weights repeat themselves.
        sampling_params={"temperature": 1, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    found = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    return Scores(cold, hit, [([entry[1] for entry in each], [entry[0] for entry in each]) for each in found])


def judged_by_stock(folder: Path, options: dict[str, Any], sequences: list[list[int]]) -> list[Logprobs]:
    engine = start(folder, **options)
    return [_score(engine, sequence, 1) for sequence in sequences]


def _score(engine: Any, sequence: list[int], from_token: int, cached_tokens: int = 0) -> Logprobs:
    """Of sequence[from_token:]."""
    answer = engine.generate(
        input_ids=sequence,
        sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=from_token - 1,
    )
    meta = answer["meta_info"]
    assert meta["cached_tokens"] >= cached_tokens, (meta["cached_tokens"], cached_tokens)
    return [entry[0] for entry in meta["input_token_logprobs"][1:]]


def judged_by_transformers(folder: Path, auto_class: str, sequences: list[list[int]]) -> list[Logprobs]:
    model = (
        getattr(transformers, auto_class)
        .from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    return [_of_model(model, torch.tensor([sequence])) for sequence in sequences]


@torch.inference_mode()
def _of_model(model: Any, token_ids: torch.Tensor) -> Logprobs:
    """token_ids [1, T]."""
    logprobs = model(input_ids=token_ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, token_ids[0, 1:, None])[:, 0].tolist()
